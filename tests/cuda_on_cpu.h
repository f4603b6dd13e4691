// Enough of CUDA to run kernels on a CPU: the threads of a block are coroutines that take turns at
// each __syncthreads(), blocks run one after another. So a barrier holds, and a missing one shows:
// every thread runs as far as it can before the next one starts.
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstring>
#include <utility>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(threads)
#define SHARED_FLOATS(name) float* name = shared_memory

struct Index {
  int x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
static Index threadIdx, blockIdx, blockDim;

// A block's shared memory, and behind it a guard that nobody should write to.
static const int SHARED = 1 << 16, GUARD = 1 << 10;
alignas(16) static float shared_memory[SHARED + GUARD];

static int __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }
static unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned __int128)a * b >> 64;
}

static const int STACK = 1 << 16;
static ucontext_t outside;
static std::vector<ucontext_t> threads;
static std::vector<char> stacks, finished;
static void (*body)(void*);
static void* body_arguments;

static void next_thread(bool done) {
  int me = threadIdx.x, count = threads.size(), next = me;
  finished[me] = done;
  do next = (next + 1) % count;
  while (finished[next] && next != me);
  if (next == me) {
    if (done) setcontext(&outside);
    return;
  }
  threadIdx.x = next;
  if (done) setcontext(&threads[next]);
  swapcontext(&threads[me], &threads[next]);
}

static void __syncthreads() { next_thread(false); }

static void start() {
  body(body_arguments);
  next_thread(true);
}

// Returns how many floats behind its shared memory a block has written to.
template <typename F>
static int run(int blocks_x, int blocks_y, int block, int shared, F kernel) {
  int overwritten = 0;
  body = [](void* f) { (*(F*)f)(); };
  body_arguments = &kernel;
  blockDim = {block, 1};
  stacks.resize((size_t)block * STACK);
  for (int y = 0; y < blocks_y; y++)
    for (int x = 0; x < blocks_x; x++) {
      blockIdx = {x, y};
      // What a kernel reads, it must have written.
      for (int i = 0; i < shared + GUARD; i++) shared_memory[i] = NAN;
      threads.assign(block, ucontext_t());
      finished.assign(block, 0);
      for (int i = 0; i < block; i++) {
        getcontext(&threads[i]);
        threads[i].uc_stack.ss_sp = &stacks[(size_t)i * STACK];
        threads[i].uc_stack.ss_size = STACK;
        makecontext(&threads[i], start, 0);
      }
      threadIdx = {0, 0};
      swapcontext(&outside, &threads[0]);
      for (int i = 0; i < GUARD; i++) overwritten += !std::isnan(shared_memory[shared + i]);
    }
  return overwritten;
}

template <typename... P, size_t... I>
static void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
  kernel(*(P*)arguments[I]...);
}

template <typename... P>
static int launch(void (*kernel)(P...), int x, int y, int block, int shared, void** arguments) {
  auto thread = [&] { call(kernel, arguments, std::index_sequence_for<P...>()); };
  return run(x, y, block, shared, thread);
}
