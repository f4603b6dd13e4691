// One training step of ResNet9 as CUDA kernels. gpu.py launches them in order; each does what one
// or several operations of mnist_resnet9.py do, and is tested against them.
//
// Arrays lie in memory as they do there: activations (H, W, N, C), kernels (3, 3, C, K), features
// (N, F). Row r of an activation is image r % N at pixel r / N, so a shift by one pixel is a shift
// by N rows: the 3×3 surroundings of 64 neighbouring rows are nine blocks of memory in one piece.
//
// Three convolutions carry nearly all of the work: y from x, dx from dy, dw from both. Each is a
// matrix product that a block of threads computes for one tile of the result: tiles of both
// factors are copied into shared memory (copy, in two buffers: in_turns), multiplied there
// (multiply), and what follows the convolution (bias, relu, the sum of a residual block, their
// gradients) is done on the way out, while the numbers are still in registers.
//
// No atomics: sums that many blocks share are written as parts and added in a fixed order
// (add_parts), so a step gives the same bits each time.

#ifdef __CUDACC__
#define SHARED_FLOATS(name) extern __shared__ __align__(16) float name[]
#endif

// ── Small things ────────────────────────────────────────────────────────────────────────────────

__host__ __device__ constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }

// Length of a row in shared memory with room for n floats. It has 32 banks, each of which serves
// one thread at a time, and a warp reads 8 numbers along one axis for 4 along the other. Rows of
// 8·odd floats, read 4 rows by 8 columns, or of 4·odd, read 8 rows by 4 columns, hit each bank
// once.
__host__ __device__ constexpr int row_of_4x8(int n) {
  return n % 16 <= 8 ? n / 16 * 16 + 8 : round_up(n, 16) + 8;
}
__host__ __device__ constexpr int row_of_8x4(int n) { return round_up(n, 8) + 4; }

// How many floats a thread copies at once, from rows of C channels.
__host__ __device__ constexpr int floats_at_once(int C) { return C % 4 ? 1 : 4; }

// Copies FLOATS (1 or 4) into shared memory, or zeros where `from` is outside of the image. Newer
// GPUs copy in the background; copies_done<n> waits until at most n groups of copies are under way.
template <int FLOATS>
__device__ void copy(float* to, const float* from, bool inside) {
#if __CUDA_ARCH__ >= 800
  unsigned address = __cvta_generic_to_shared(to);
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from),
               "n"(4 * FLOATS), "r"(inside ? 4 * FLOATS : 0));
#else
  if (FLOATS == 4)
    *(float4*)to = inside ? *(const float4*)from : float4{0, 0, 0, 0};
  else
    *to = inside ? *from : 0;
#endif
}

__device__ void end_of_group() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;");
#endif
}

template <int GROUPS>
__device__ void copies_done() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS));
#endif
}

// Fills two buffers in turns: while stage s is used, stage s + 1 is copied into the other buffer.
// fill(stage, buffer) starts the copies of a stage, use(buffer) computes with what they brought.
template <typename Fill, typename Use>
__device__ void in_turns(int stages, Fill fill, Use use) {
  fill(0, 0);
  end_of_group();
  for (int stage = 0; stage < stages; stage++) {
    int buffer = stage % 2;
    if (stage + 1 < stages) {
      fill(stage + 1, 1 - buffer);
      end_of_group();
      copies_done<1>();  // all but the group that was just begun
    } else {
      copies_done<0>();
    }
    __syncthreads();  // a thread waits for its own copies; now those of all others are there too
    use(buffer);
    __syncthreads();  // all threads have used this buffer; now it may be filled anew
  }
}

template <int THREADS>
__device__ void fill_with_zeros(float* a, int size) {
  for (int i = threadIdx.x; i < size; i += THREADS) a[i] = 0;
  __syncthreads();
}

// The sum of one number a thread, the same in all threads, added in the same order each time.
template <int THREADS>
__device__ float sum_of_block(float value, float* scratch) {
  int i = threadIdx.x;
  scratch[i] = value;
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (i < half) scratch[i] += scratch[i + half];
  }
  __syncthreads();
  float sum = scratch[0];
  __syncthreads();
  return sum;
}

// ── Matrix products ─────────────────────────────────────────────────────────────────────────────

// A matrix in memory: from one row to the next it is ROW floats, from one column to the next COLUMN
// floats, so it may be transposed.
template <int ROW, int COLUMN>
struct Matrix {
  const float* start;
  __device__ float operator()(int row, int column) const {
    return start[row * ROW + column * COLUMN];
  }
};

// multiply<DEPTH>(acc, a, b): acc += a b, where a has DEPTH columns and b has DEPTH rows, for the
// tile of MT·16 rows and NT·8 columns that a warp (32 threads) is responsible for. Each thread has
// four numbers of each 16×8 part of it: two of one row, and below them two of another one.
// for_pairs goes through these pairs: use(row, column, left, right), from the tile's first row and
// column.
template <int MT, int NT, typename F>
__device__ void for_pairs(const float (&acc)[MT][NT][4], F use) {
  int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        use(16 * m + row + 8 * half, 8 * n + column, acc[m][n][2 * half], acc[m][n][2 * half + 1]);
}

// Tensor cores (from compute capability 8.0 on) multiply such parts in one instruction, but round
// each factor to 11 significant bits (TF32). A float has 24: so each factor is split into its
// upper 11 bits and the rest, x = high + low, and three products make up a float32 one:
// A B ≈ low·high + high·low + high·high. What is left out, low·low, is below 2⁻²² of the result;
// that tensor cores cut off digits where they add costs more: some 10⁻⁶
// (tests/test_gpu_kernels.py).

#if __CUDA_ARCH__ >= 800 && !defined(PLAIN_PRODUCTS)

__device__ void split(float x, unsigned& high, unsigned& low) {
  high = (__float_as_uint(x) + 0x1000) & 0xffffe000;  // rounded to 11 bits
  low = __float_as_uint(x - __uint_as_float(high));
}

__device__ void tensor_core(float (&acc)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <int DEPTH, int MT, int NT, typename A, typename B>
__device__ void multiply(float (&acc)[MT][NT][4], A a, B b) {
  int row = threadIdx.x % 32 / 4, four = threadIdx.x % 4;
#pragma unroll 4
  for (int k = four; k < DEPTH; k += 8) {
    unsigned a_high[MT][4], a_low[MT][4], b_high[NT][2], b_low[NT][2];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        split(a(16 * m + row + i % 2 * 8, k + i / 2 * 4), a_high[m][i], a_low[m][i]);
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) split(b(k + 4 * i, 8 * n + row), b_high[n][i], b_low[n][i]);
    // One product of all parts after the other: each waits for the sum before it, others do not.
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int n = 0; n < NT; n++) tensor_core(acc[m][n], a_low[m], b_high[n]);
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int n = 0; n < NT; n++) tensor_core(acc[m][n], a_high[m], b_low[n]);
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int n = 0; n < NT; n++) tensor_core(acc[m][n], a_high[m], b_high[n]);
  }
}

#else

template <int DEPTH, int MT, int NT, typename A, typename B>
__device__ void multiply(float (&acc)[MT][NT][4], A a, B b) {
  int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll 4
  for (int k = 0; k < DEPTH; k++)
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          acc[m][n][i] += a(16 * m + row + i / 2 * 8, k) * b(k, 8 * n + column + i % 2);
}

#endif

// ── Convolutions ────────────────────────────────────────────────────────────────────────────────

// r / N, where inverse is 2³²/N rounded up: exact where r N < 2³², so up to N = 2,340.
__device__ int pixel_of(int r, unsigned inverse) { return inverse ? __umulhi(r, inverse) : r; }

// Where in its image a row of an activation is.
struct Place {
  short row, column;

  // Whether the pixel so far down and to the right is in an image of SIDE × SIDE pixels.
  template <int SIDE>
  __device__ bool has(int down, int right) const {
    unsigned r = row + down, c = column + right;  // below 0 is a large number then
    return r < SIDE && c < SIDE;
  }
};

// The place of row r; from row `end` on, one that is far outside of every image.
template <int SIDE>
__device__ Place place_of(int r, int end, unsigned inverse) {
  int pixel = pixel_of(r, inverse);
  if (r >= end) return {-SIDE, -SIDE};
  return {(short)(pixel / SIDE), (short)(pixel % SIDE)};
}

// Shares ROWS · PER_ROW copies out over the threads of a block: use(j, row, place in the row) for
// the copies j = 0, 1, … of this thread.
template <int ROWS, int PER_ROW, int THREADS, typename F>
__device__ void for_copies(F use) {
#pragma unroll
  for (int j = 0; j < (ROWS * PER_ROW + THREADS - 1) / THREADS; j++) {
    unsigned i = threadIdx.x + j * THREADS, row = i / PER_ROW, at = i % PER_ROW;
    if (THREADS % PER_ROW == 0)  // the same, with nothing left to compute for each j
      row = threadIdx.x / PER_ROW + j * (THREADS / PER_ROW), at = threadIdx.x % PER_ROW;
    if (ROWS * PER_ROW % THREADS == 0 || row < ROWS) use(j, (int)row, (int)at);
  }
}

// Rows first … first + ROWS of the windows: what TAPS taps of the kernel, from `tap` on, see of x
// (SIDE, SIDE, N, C), with zeros beyond the border; of each tap SLICE channels, from `channel` on,
// with zeros beyond the last one. place(j, r) is the place of row first + r, this thread's copy j.
template <int SIDE, int C, int TAPS, int SLICE, int ROWS, int LENGTH, int THREADS, typename F>
__device__ void copy_windows(float* to, const float* x, int first, int tap, int channel, int N,
                             F place) {
  constexpr int FLOATS = floats_at_once(C);
  for_copies<ROWS, TAPS * SLICE / FLOATS, THREADS>([&](int j, int r, int at) {
    int k = at * FLOATS, c = channel + k % SLICE;
    int down = (tap + k / SLICE) / 3 - 1, right = (tap + k / SLICE) % 3 - 1;
    Place here = place(j, r);
    bool inside = here.template has<SIDE>(down, right) && (C % SLICE == 0 || c < C);
    const float* from = x + (first + r + (down * SIDE + right) * N) * C + c;
    copy<FLOATS>(to + r * LENGTH + k, inside ? from : x, inside);
  });
}

// Forward (BACK = false): y = conv(x, w) + b [+ add], then relu; w is (3, 3, C, K).
// Backward (BACK = true): y = (conv(x, w turned round and transposed) [+ add]) · [gate > 0], where
// x is the gradient of the layer's output, y that of its input, gate that input; w is (3, 3, K, C).
// b, add and gate may be null. A block computes WARPS_M·MT·16 rows by WARPS_N·NT·8 channels of y,
// in stages of TAPS taps of the kernel and, of each, SLICE channels.
template <int SIDE, int C, int K, bool BACK, int TAPS, int SLICE, int WARPS_M, int WARPS_N, int MT,
          int NT>
__global__ void __launch_bounds__(WARPS_M * WARPS_N * 32)
    convolution(const float* x, const float* w, const float* b, const float* add, const float* gate,
                float* y, int relu, int N, unsigned inverse) {
  constexpr int THREADS = WARPS_M * WARPS_N * 32;
  constexpr int ROWS = WARPS_M * MT * 16, COLUMNS = WARPS_N * NT * 8;
  constexpr int SLICES = (C + SLICE - 1) / SLICE, STAGES = 9 / TAPS * SLICES;
  constexpr int DEPTH = round_up(TAPS * SLICE, 8);
  static_assert(TAPS == 1 || SLICES == 1, "one tap is cut, several are not");
  constexpr int A_ROW = row_of_8x4(DEPTH), B_ROW = BACK ? row_of_8x4(DEPTH) : row_of_4x8(COLUMNS);
  constexpr int A_SIZE = ROWS * A_ROW, B_SIZE = (BACK ? COLUMNS : DEPTH) * B_ROW;
  constexpr int FLOATS = floats_at_once(C), PER_ROW = TAPS * SLICE / FLOATS;
  SHARED_FLOATS(shared);
  int rows = SIDE * SIDE * N, first_row = blockIdx.x * ROWS, first_column = blockIdx.y * COLUMNS;

  Place places[(ROWS * PER_ROW + THREADS - 1) / THREADS];  // the same in all stages
  for_copies<ROWS, PER_ROW, THREADS>(
      [&](int j, int r, int) { places[j] = place_of<SIDE>(first_row + r, rows, inverse); });
  auto has_channel = [](int c) { return C % SLICE == 0 || c < C; };
  auto has_column = [&](int c) { return K % COLUMNS == 0 || first_column + c < K; };

  auto fill = [&](int stage, int buffer) {
    float *windows = shared + buffer * (A_SIZE + B_SIZE), *kernel = windows + A_SIZE;
    int tap = stage / SLICES * TAPS, channel = stage % SLICES * SLICE;
    copy_windows<SIDE, C, TAPS, SLICE, ROWS, A_ROW, THREADS>(
        windows, x, first_row, tap, channel, N, [&](int j, int) { return places[j]; });
    if (BACK) {  // (K, C) of each tap; turned round, tap 8 comes first
      for_copies<COLUMNS, PER_ROW, THREADS>([&](int, int column, int at) {
        int k = at * FLOATS, c = channel + k % SLICE;
        bool inside = has_column(column) && has_channel(c);
        const float* from = w + ((8 - tap - k / SLICE) * K + first_column + column) * C + c;
        copy<FLOATS>(kernel + column * B_ROW + k, inside ? from : w, inside);
      });
    } else {
      for_copies<TAPS * SLICE, COLUMNS / 4, THREADS>([&](int, int k, int at) {
        bool inside = has_column(4 * at) && has_channel(channel + k);
        const float* from = w + (tap * C + channel + k) * K + first_column + 4 * at;
        copy<4>(kernel + k * B_ROW + 4 * at, inside ? from : w, inside);
      });
    }
  };

  if (DEPTH != TAPS * SLICE)  // the product reads what no copy fills
    fill_with_zeros<THREADS>(shared, (STAGES > 1 ? 2 : 1) * (A_SIZE + B_SIZE));
  int warp_row = threadIdx.x / 32 / WARPS_N * MT * 16;
  int warp_column = threadIdx.x / 32 % WARPS_N * NT * 8;
  float acc[MT][NT][4] = {};
  in_turns(STAGES, fill, [&](int buffer) {
    const float *windows = shared + buffer * (A_SIZE + B_SIZE), *kernel = windows + A_SIZE;
    Matrix<A_ROW, 1> a{windows + warp_row * A_ROW};
    if (BACK)
      multiply<DEPTH>(acc, a, Matrix<1, B_ROW>{kernel + warp_column * B_ROW});
    else
      multiply<DEPTH>(acc, a, Matrix<B_ROW, 1>{kernel + warp_column});
  });

  for_pairs(acc, [&](int row, int column, float left, float right) {
    int r = first_row + warp_row + row, c = first_column + warp_column + column;
    if (r >= rows || c >= K) return;
    if (b) left += b[c], right += b[c + 1];
    if (add) {
      float2 other = *(const float2*)(add + r * K + c);
      left += other.x, right += other.y;
    }
    if (relu) left *= left > 0, right *= right > 0;
    if (gate) {
      float2 passed = *(const float2*)(gate + r * K + c);
      left *= passed.x > 0, right *= passed.y > 0;
    }
    *(float2*)(y + r * K + c) = {left, right};
  });
}

// dw = windowsᵀ dy and db = Σ dy, as parts: block (p, …) sums over some of the rows, ROWS at a
// time, and each of its WARPS_R groups of warps over some of those; part q = p · WARPS_R + group is
// (9·C·K + K) floats of `parts`, kernel first, then bias. blockIdx.y says which TAPS of the taps
// and which channels of dy.
template <int SIDE, int C, int K, int TAPS, int WARPS_M, int WARPS_N, int WARPS_R, int MT, int NT,
          int ROWS>
__global__ void __launch_bounds__(WARPS_M * WARPS_N * WARPS_R * 32)
    kernel_gradient(const float* x, const float* dy, float* parts, int rows_a_block, int N,
                    unsigned inverse) {
  constexpr int THREADS = WARPS_M * WARPS_N * WARPS_R * 32, COLUMNS = WARPS_N * NT * 8;
  constexpr int DEPTH = ROWS / WARPS_R, COLUMN_TILES = (K + COLUMNS - 1) / COLUMNS;
  static_assert(THREADS >= COLUMNS, "each column's bias is added by a thread of its own");
  constexpr int X_ROW = row_of_4x8(WARPS_M * MT * 16), Y_ROW = row_of_4x8(COLUMNS);
  constexpr int X_SIZE = ROWS * X_ROW, Y_SIZE = ROWS * Y_ROW;
  SHARED_FLOATS(shared);
  int tap = blockIdx.y / COLUMN_TILES * TAPS, first_column = blockIdx.y % COLUMN_TILES * COLUMNS;
  int start = blockIdx.x * rows_a_block, end = start + rows_a_block;
  if (end > SIDE * SIDE * N) end = SIDE * SIDE * N;
  auto has_column = [&](int c) { return K % COLUMNS == 0 || first_column + c < K; };

  auto fill = [&](int stage, int buffer) {
    float *windows = shared + buffer * (X_SIZE + Y_SIZE), *slopes = windows + X_SIZE;
    int first = start + stage * ROWS;
    copy_windows<SIDE, C, TAPS, C, ROWS, X_ROW, THREADS>(
        windows, x, first, tap, 0, N,
        [&](int, int r) { return place_of<SIDE>(first + r, end, inverse); });
    for_copies<ROWS, COLUMNS / 4, THREADS>([&](int, int r, int at) {
      bool inside = first + r < end && has_column(4 * at);
      const float* from = dy + (first + r) * K + first_column + 4 * at;
      copy<4>(slopes + r * Y_ROW + 4 * at, inside ? from : dy, inside);
    });
  };

  if (WARPS_M * MT * 16 != TAPS * C)  // the product reads what no copy fills
    fill_with_zeros<THREADS>(shared, 2 * (X_SIZE + Y_SIZE));
  int group = threadIdx.x / 32 / (WARPS_M * WARPS_N), warp = threadIdx.x / 32 % (WARPS_M * WARPS_N);
  int warp_row = warp / WARPS_N * MT * 16, warp_column = warp % WARPS_N * NT * 8;
  float acc[MT][NT][4] = {}, bias = 0;
  in_turns((end - start + ROWS - 1) / ROWS, fill, [&](int buffer) {
    const float *windows = shared + buffer * (X_SIZE + Y_SIZE), *slopes = windows + X_SIZE;
    Matrix<1, X_ROW> transposed{windows + group * DEPTH * X_ROW + warp_row};
    multiply<DEPTH>(acc, transposed,
                    Matrix<Y_ROW, 1>{slopes + group * DEPTH * Y_ROW + warp_column});
    if (tap == 0 && threadIdx.x < COLUMNS)
      for (int r = 0; r < ROWS; r++) bias += slopes[r * Y_ROW + threadIdx.x];
  });

  constexpr int SIZE = 9 * C * K + K;
  float* part = parts + (blockIdx.x * WARPS_R + group) * SIZE;
  for_pairs(acc, [&](int row, int column, float left, float right) {
    int r = warp_row + row, c = first_column + warp_column + column;
    if (r < TAPS * C && c < K) *(float2*)(part + (tap * C + r) * K + c) = {left, right};
  });
  if (tap == 0 && threadIdx.x < COLUMNS && has_column(threadIdx.x))
    for (int q = 0; q < WARPS_R; q++)
      parts[(blockIdx.x * WARPS_R + q) * SIZE + 9 * C * K + first_column + threadIdx.x] =
          q ? 0 : bias;
}

// sum[i] = parts[0][i] + parts[1][i] + …: a block adds COLUMNS of them, 256/COLUMNS threads each.
template <int COLUMNS>
__global__ void __launch_bounds__(256)
    add_parts(const float* parts, float* sum, int size, int count) {
  constexpr int THREADS = 256 / COLUMNS;
  __shared__ float sums[256];
  int i = blockIdx.x * COLUMNS + threadIdx.x % COLUMNS;
  float mine = 0;
  if (i < size) {
#pragma unroll 8
    for (int part = threadIdx.x / COLUMNS; part < count; part += THREADS)
      mine += parts[part * size + i];
  }
  sums[threadIdx.x] = mine;
  __syncthreads();
  if (threadIdx.x < COLUMNS && i < size) {
    for (int other = 1; other < THREADS; other++) mine += sums[COLUMNS * other + threadIdx.x];
    sum[i] = mine;
  }
}

// ── Pooling ─────────────────────────────────────────────────────────────────────────────────────

// The four values of a 2×2 window of x (SIDE, SIDE, N, C); at: place in the pooled (SIDE/2, SIDE/2,
// N, C).
template <int SIDE, typename F>
__device__ void for_window(int at, int NC, F use) {
  constexpr int HALF = SIDE / 2;
  int pixel = at / NC, from = (pixel / HALF * 2 * SIDE + pixel % HALF * 2) * NC + at % NC;
  use(from), use(from + NC), use(from + SIDE * NC), use(from + SIDE * NC + NC);
}

template <int SIDE, bool MAX>
__device__ float pooled(const float* x, int at, int NC) {
  float y = MAX ? -1e38f : 0;
  for_window<SIDE>(at, NC, [&](int from) {
    if (MAX)
      y = x[from] > y ? x[from] : y;
    else
      y += x[from] / 4;
  });
  return y;
}

// dx at the window, from dy; then through the relu that made x: 0 where x is 0.
template <int SIDE, bool MAX>
__device__ void unpooled(const float* x, float dy, float* dx, int at, int NC) {
  float least = 0;
  if (MAX) {
    float y = pooled<SIDE, MAX>(x, at, NC);
    least = y - 1e-5f * (1 + fabsf(y));  // equal up to rounding counts as equal
  }
  for_window<SIDE>(at, NC, [&](int from) {
    float slope = MAX ? dy * (x[from] >= least) : dy / 4;
    dx[from] = slope * (x[from] > 0);
  });
}

template <int SIDE, bool MAX>
__global__ void pool(const float* x, float* y, int size, int NC) {
  int at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at < size) y[at] = pooled<SIDE, MAX>(x, at, NC);
}

template <int SIDE, bool MAX>
__global__ void pool_gradient(const float* x, const float* dy, float* dx, int size, int NC) {
  int at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at < size) unpooled<SIDE, MAX>(x, dy[at], dx, at, NC);
}

// ── Random numbers ──────────────────────────────────────────────────────────────────────────────
// Philox4x64-10 (Salmon and others 2011): four random words are a function of a key and a counter.
// Numbered as NumPy numbers them, so uniform(key, i) is number i of
// np.random.Generator(np.random.Philox(key=key)).random(size, dtype=np.float32).

typedef unsigned long long word;

__device__ void philox(word key, word counter, word (&out)[4]) {
  word a = counter, b = 0, c = 0, d = 0, key0 = key, key1 = 0;
  for (int round = 0; round < 10; round++) {
    word a_high = __umul64hi(0xD2E7470EE14C6C93, a), c_high = __umul64hi(0xCA5A826395121157, c);
    word a_low = 0xD2E7470EE14C6C93 * a, c_low = 0xCA5A826395121157 * c;
    a = c_high ^ b ^ key0, b = c_low, c = a_high ^ d ^ key1, d = a_low;
    key0 += 0x9E3779B97F4A7C15, key1 += 0xBB67AE8584CAA73B;
  }
  out[0] = a, out[1] = b, out[2] = c, out[3] = d;
}

// Numbers 8·block … 8·block + 7, uniform in [0, 1).
__device__ void eight_uniform(word key, word block, float (&u)[8]) {
  word words[4];
  philox(key, block + 1, words);
  for (int i = 0; i < 8; i++)
    u[i] = ((unsigned)(words[i / 2] >> i % 2 * 32) >> 8) * (1.0f / 16777216);
}

__device__ float uniform(word key, int i) {
  float u[8];
  eight_uniform(key, i / 8, u);
  return u[i % 8];
}

// Two uniform numbers make two normal ones (Box and Muller 1958).
__device__ float normal(word key, int i) {
  float u[8];
  eight_uniform(key, i / 8, u);
  float length = sqrtf(-2 * logf(1 - u[i % 8 / 2 * 2])), angle = 6.2831853f * u[i % 8 / 2 * 2 + 1];
  return length * (i % 2 ? sinf(angle) : cosf(angle));
}

__global__ void fill_uniform(float* out, int size, word key, int first) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < size) out[i] = uniform(key, first + i);
}

__global__ void fill_normal(float* out, int size, word key, int first) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < size) out[i] = normal(key, first + i);
}

// dropout's mask: 0 with probability `rate`, else 1/(1 − rate); first: a multiple of 8.
__global__ void dropout_mask(float* mask, int size, float rate, float kept, int first,
                             const word* keys, const int* next) {
  int block = blockIdx.x * blockDim.x + threadIdx.x;
  if (8 * block >= size) return;
  float u[8];
  eight_uniform(keys[next[0]], first / 8 + block, u);
  for (int i = 0; i < 8 && 8 * block + i < size; i++) mask[8 * block + i] = u[i] >= rate ? kept : 0;
}

// ── Images ──────────────────────────────────────────────────────────────────────────────────────
// x (28, 28, N, 1), augmented and normalised, from images (…, 28, 28) of bytes: four blocks for
// each image of the batch. order: which images; the batch of step s starts at order[s · batch].
// Without order, image n of the batch is image n. bumps (J, 28·28): what bends the image (see
// augment).

template <bool AUGMENT>
__global__ void __launch_bounds__(256)
    read_images(const unsigned char* images, const int* order, int batch, float* x, int N,
                float strength, float elastic, const float* bumps, int J, const word* keys,
                const int* next, int* now) {
  constexpr int SIDE = 28, PADDED = SIDE + 3;
  __shared__ float image[PADDED * PADDED], draws[6], bend[2][64];
  int n = blockIdx.x, pixel = blockIdx.y * 256 + threadIdx.x, step = order ? next[0] : 0;
  if (order && n == 0 && blockIdx.y == 0 && threadIdx.x == 0) now[0] = step;
  const unsigned char* source = images + (order ? order[step * batch + n] : n) * (SIDE * SIDE);
  if (!AUGMENT) {
    if (pixel < SIDE * SIDE) x[pixel * N + n] = (source[pixel] / 255.0f - 0.1307f) / 0.3081f;
    return;
  }
  word key = keys[step];
  int t = threadIdx.x, uniforms = round_up(6 * N, 8), normals = round_up(N * J, 8);
  if (t < 6) draws[t] = strength * (2 * uniform(key, t * N + n) - 1);
  if (elastic > 0 && t < 2 * J)
    bend[t / J][t % J] = elastic * normal(key, uniforms + t / J * normals + n * J + t % J);
  for (int i = t; i < PADDED * PADDED; i += 256) {  // a border of zeros
    int row = i / PADDED - 1, col = i % PADDED - 1;
    image[i] = row >= 0 && row < SIDE && col >= 0 && col < SIDE ? source[row * SIDE + col] : 0;
  }
  __syncthreads();
  float turn = 0.20943951f * draws[0], shear = 0.15f * draws[1];  // 12 degrees
  float wide = 1 + 0.12f * draws[2], high = 1 + 0.12f * draws[3];
  float cosine = cosf(turn), sine = sinf(turn), middle = (SIDE - 1) / 2.0f;
  if (pixel >= SIDE * SIDE) return;
  float down = pixel / SIDE - middle, right = pixel % SIDE - middle;
  float row = cosine / high * down + sine / high * right + 2 * draws[4] + middle;
  float col = (shear * cosine - sine) / wide * down + (shear * sine + cosine) / wide * right +
              2 * draws[5] + middle;
  if (elastic > 0)
    for (int j = 0; j < J; j++) {
      row += bend[0][j] * bumps[j * SIDE * SIDE + pixel];
      col += bend[1][j] * bumps[j * SIDE * SIDE + pixel];
    }
  row = fminf(fmaxf(row, -1), SIDE), col = fminf(fmaxf(col, -1), SIDE);
  float top = floorf(row), left = floorf(col), below = row - top, beside = col - left;
  const float* corner = image + ((int)top + 1) * PADDED + (int)left + 1;
  float upper = corner[0] * (1 - beside) + corner[1] * beside;
  float lower = corner[PADDED] * (1 - beside) + corner[PADDED + 1] * beside;
  x[pixel * N + n] = ((upper * (1 - below) + lower * below) / 255 - 0.1307f) / 0.3081f;
}

// ── From the last activations to the loss, and back ─────────────────────────────────────────────

// Features (N, F) from x (14, 14, N, C): pooled, and dropped out where mask is 0 (null: none). Then
// logits = features w + b; with labels, the loss of each image and dlogits too. One block an image.
template <int C, bool MAX>
__global__ void __launch_bounds__(256)
    head(const float* x, const float* mask, const float* w, const float* b, float* features,
         float* logits, const unsigned char* labels, const int* order, int batch, const int* now,
         float smoothing, float* losses, float* dlogits, int N) {
  constexpr int F = 49 * C;
  __shared__ float scratch[10][256], row[10];
  int n = blockIdx.x;
  float sums[10] = {};
  for (int f = threadIdx.x; f < F; f += 256) {
    float feature = pooled<14, MAX>(x, (f / C * N + n) * C + f % C, N * C);
    if (mask) feature *= mask[n * F + f];
    if (features) features[n * F + f] = feature;
    for (int k = 0; k < 10; k++) sums[k] += feature * w[f * 10 + k];
  }
  for (int k = 0; k < 10; k++) scratch[k][threadIdx.x] = sums[k];
  for (int half = 128; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half)
      for (int k = 0; k < 10; k++) scratch[k][threadIdx.x] += scratch[k][threadIdx.x + half];
  }
  __syncthreads();
  if (threadIdx.x < 10) row[threadIdx.x] = scratch[threadIdx.x][0] + b[threadIdx.x];
  __syncthreads();
  if (threadIdx.x < 10) logits[n * 10 + threadIdx.x] = row[threadIdx.x];
  if (!labels || threadIdx.x >= 10) return;
  float largest = row[0], total = 0, mean = 0;
  for (int k = 1; k < 10; k++) largest = row[k] > largest ? row[k] : largest;
  for (int k = 0; k < 10; k++) total += expf(row[k] - largest), mean += row[k] / 10;
  float log_sum = logf(total) + largest;
  int k = threadIdx.x, label = labels[order[now[0] * batch + n]];
  float target = (1 - smoothing) * (k == label) + smoothing / 10;
  dlogits[n * 10 + k] = (expf(row[k] - log_sum) - target) / N;
  if (k == 0) losses[n] = log_sum - (1 - smoothing) * row[label] - smoothing * mean;
}

// dx (14, 14, N, C) from dlogits: back through the linear layer, dropout, pooling and relu.
template <int C, bool MAX>
__global__ void head_gradient(const float* x, const float* mask, const float* w,
                              const float* dlogits, float* dx, int N) {
  int at = blockIdx.x * blockDim.x + threadIdx.x;  // in (7, 7, N, C)
  if (at >= 49 * N * C) return;
  int f = at / (N * C) * C + at % C, n = at / C % N;
  float dfeature = 0;
  for (int k = 0; k < 10; k++) dfeature += dlogits[n * 10 + k] * w[f * 10 + k];
  if (mask) dfeature *= mask[n * 49 * C + f];
  unpooled<14, MAX>(x, dfeature, dx, at, N * C);
}

// dw (F, 10) = featuresᵀ dlogits, and after it db (10) = Σ dlogits: a block for 32 features.
__global__ void __launch_bounds__(256)
    linear_gradient(const float* features, const float* dlogits, float* dw, int F, int N) {
  __shared__ float sums[8][32][10];
  int f = blockIdx.x * 32 + threadIdx.x % 32, eighth = threadIdx.x / 32;
  float mine[10] = {};
  for (int n = eighth; n < N; n += 8) {
    float feature = f < F ? features[n * F + f] : f == F;  // one more feature, always 1: the bias
    for (int k = 0; k < 10; k++) mine[k] += feature * dlogits[n * 10 + k];
  }
  for (int k = 0; k < 10; k++) sums[eighth][threadIdx.x % 32][k] = mine[k];
  __syncthreads();
  for (int i = threadIdx.x; i < 320; i += 256) {
    float sum = 0;
    for (int part = 0; part < 8; part++) sum += sums[part][i / 10][i % 10];
    int at = blockIdx.x * 320 + i;
    if (at < F * 10 + 10) dw[at] = sum;
  }
}

// ── Optimizers ──────────────────────────────────────────────────────────────────────────────────
// What changes from step to step is a row of `plan`, numbered as below.

enum { RATE, SHRINK, ADAM_RATE, CORRECTION, EMA_TAKES, PLAN_LENGTH };
enum { SGD, ADAM, MUON };
enum { BIAS, WEIGHT, MUON_WEIGHT };

// fresh1 and fresh2 are 1 − beta1 and 1 − beta2: what the moments take of the new gradient.
__device__ void adam_moments(float dw, float& m, float& v, float fresh1, float fresh2) {
  m += fresh1 * (dw - m);
  v += fresh2 * (dw * dw - v);
}

// All parameters but those of Muon; the mean of the batch's losses; and the counter of steps.
template <int OPTIMIZER>
__global__ void __launch_bounds__(256)
    update(float* w, const float* dw, float* moments, float* ema, const unsigned char* kinds,
           int size, float beta1, float fresh1, float fresh2, const float* plan,
           const float* image_losses, int N, float* losses, const int* now, int* next) {
  __shared__ float scratch[256];
  int i = blockIdx.x * 256 + threadIdx.x;
  const float* row = plan + now[0] * PLAN_LENGTH;
  if (i < size && kinds[i] != MUON_WEIGHT) {
    float value = w[i], slope = dw[i];
    if (kinds[i] != BIAS) value *= row[SHRINK];
    if (OPTIMIZER == SGD) {
      moments[i] = beta1 * moments[i] + slope;
      value -= row[RATE] * moments[i];
    } else {
      float m = moments[i], v = moments[size + i];
      adam_moments(slope, m, v, fresh1, fresh2);
      moments[i] = m, moments[size + i] = v;
      value -= row[ADAM_RATE] * m / (sqrtf(v / row[CORRECTION]) + 1e-8f);
    }
    w[i] = value;
    if (ema) ema[i] += row[EMA_TAKES] * (value - ema[i]);
  }
  if (blockIdx.x == 0) {
    float mine = 0;
    for (int n = threadIdx.x; n < N; n += 256) mine += image_losses[n];
    float sum = sum_of_block<256>(mine, scratch);
    if (threadIdx.x == 0) losses[now[0]] = sum / N, next[0] = now[0] + 1;
  }
}

// Muon's step for one kernel, seen as a matrix (R, K). orthogonal(X) of the script takes five
// rounds X ← X P with P = a + b G + c G² and G = Xᵀ X. All P are polynomials of the first G, so
// they commute and are symmetric, and G ← P G P. So the rounds need (K, K) matrices only, which fit
// into one multiprocessor; X is used twice, by many of them: for G before the rounds, and for X Q
// after them, with Q = P₁ P₂ P₃ P₄ P₅. K is padded with zeros to KP, a multiple of 16.

// X = the running mean of dw, one step ahead, and 32 rows' part of G.
template <int R, int K>
__global__ void __launch_bounds__(256) muon_mean(const float* dw, float* m, float* X, float* parts,
                                                 float beta1, float fresh1) {
  constexpr int KP = round_up(K, 16), ROW = row_of_4x8(KP), TILES = KP / 16;
  __shared__ float strip[32 * ROW];
  int first = blockIdx.x * 32, warp = threadIdx.x / 32;
  for (int at = threadIdx.x; at < 32 * KP; at += 256) {
    int r = first + at / KP, c = at % KP, i = r * K + c;
    float x = 0;
    if (r < R && c < K) {
      float slope = dw[i], mean = m[i];
      mean += fresh1 * (slope - mean);
      m[i] = mean;
      x = fresh1 * slope + beta1 * mean;
    }
    X[first * KP + at] = strip[at / KP * ROW + c] = x;
  }
  __syncthreads();
  for (int task = warp; task < TILES * TILES; task += 8) {
    int row = task / TILES * 16, column = task % TILES * 16;
    float acc[1][2][4] = {};
    multiply<32>(acc, Matrix<1, ROW>{strip + row}, Matrix<ROW, 1>{strip + column});
    for_pairs(acc, [&](int r, int c, float left, float right) {
      *(float2*)(parts + (blockIdx.x * KP + row + r) * KP + column + c) = {left, right};
    });
  }
}

// Q (KP, KP) from `count` parts of G, in one block with a tile of 16 rows and NT·8 columns for each
// warp; and in scale[0] what brings X to length 1, so that no singular value of it is above 1. The
// three matrices of the rounds lie in shared memory or, where that is too small, in room.
template <int K, int NT, bool IN_SHARED>
__global__ void __launch_bounds__(round_up(K, 16) / 16 * (round_up(K, 16) / 8 / NT) * 32)
    muon_rounds(const float* parts, int count, float* room, float* Q_out, float* scale) {
  constexpr int KP = round_up(K, 16), ROW = row_of_4x8(KP), TILES = KP / 8 / NT;
  constexpr int THREADS = KP / 16 * TILES * 32;
  SHARED_FLOATS(shared);
  float* G = IN_SHARED ? shared : room;
  float *P = G + KP * ROW, *Q = P + KP * ROW;
  int row = threadIdx.x / 32 / TILES * 16, column = threadIdx.x / 32 % TILES * NT * 8;

  for (int at = threadIdx.x; at < KP * KP; at += THREADS) {
    float sum = 0;
#pragma unroll 4
    for (int part = 0; part < count; part++) sum += parts[part * KP * KP + at];
    G[at / KP * ROW + at % KP] = sum;
  }
  __syncthreads();
  float squares = 0;  // the sum of all squares of X is the trace of G
  for (int k = 0; k < KP; k++) squares += G[k * ROW + k];
  float length = 1 / (sqrtf(squares) + 1e-7f);
  if (threadIdx.x == 0) scale[0] = length;
  __syncthreads();
  for (int at = threadIdx.x; at < KP * KP; at += THREADS)
    G[at / KP * ROW + at % KP] *= length * length;
  __syncthreads();

  // out = use(place, a b) for symmetric matrices; out may be a or b.
  auto product = [&](const float* a, const float* b, float* out, auto use) {
    float acc[1][NT][4] = {};
    multiply<KP>(acc, Matrix<1, ROW>{a + row}, Matrix<ROW, 1>{b + column});
    __syncthreads();
    for_pairs(acc, [&](int r, int c, float left, float right) {
      r += row, c += column;
      *(float2*)(out + r * ROW + c) = {use(r, c, left), use(r, c + 1, right)};
    });
    __syncthreads();
  };
  auto keep = [](int, int, float x) { return x; };
  for (int round = 0; round < 5; round++) {
    product(G, G, P, [&](int r, int c, float square) {
      return (r == c ? 3.4445f : 0) - 4.775f * G[r * ROW + c] + 2.0315f * square;
    });
    if (round == 0) {
      for (int i = threadIdx.x; i < KP * ROW; i += THREADS) Q[i] = P[i];
      __syncthreads();
    } else {
      product(Q, P, Q, keep);
    }
    if (round < 4) {
      product(P, G, G, keep);
      product(G, P, G, keep);
    }
  }
  for (int at = threadIdx.x; at < KP * KP; at += THREADS) Q_out[at] = Q[at / KP * ROW + at % KP];
}

// w ← w · shrink − 0.2 rate √(longer side) scale X Q: a warp for 16 rows.
template <int R, int K>
__global__ void __launch_bounds__(128)
    muon_update(float* w, float* ema, const float* X, const float* Q, const float* scale,
                const float* plan, const int* now) {
  constexpr int KP = round_up(K, 16);
  int first = (blockIdx.x * 4 + threadIdx.x / 32) * 16;
  if (first >= R) return;
  const float* row = plan + now[0] * PLAN_LENGTH;
  float size = row[RATE] * 0.2f * sqrtf(R > K ? R : K) * scale[0];
  float acc[1][KP / 8][4] = {};
  multiply<KP>(acc, Matrix<KP, 1>{X + first * KP}, Matrix<KP, 1>{Q});
  for_pairs(acc, [&](int r, int c, float left, float right) {
    float change[2] = {left, right};
    for (int i = 0; i < 2; i++) {
      int at = (first + r) * K + c + i;
      if (first + r >= R || c + i >= K) continue;
      w[at] = w[at] * row[SHRINK] - size * change[i];
      if (ema) ema[at] += row[EMA_TAKES] * (w[at] - ema[at]);
    }
  });
}
