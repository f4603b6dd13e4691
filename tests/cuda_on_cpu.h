// Enough of CUDA to run kernels on a CPU: the threads of a block are coroutines that take turns at
// each __syncthreads(), blocks run one after another. So a barrier holds, and a missing one shows:
// every thread runs as far as it can before the next one starts.
#undef _FORTIFY_SOURCE  // it takes a jump to another stack for a mistake
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstring>
#include <deque>
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

// A thread of the block: a coroutine with a stack of its own. It starts in a context of its own, and
// jumps from then on, which takes no system call. It outlives the block, to be the same thread of
// the next one.
struct Thread {
  ucontext_t context;
  jmp_buf place;
  bool started = false, finished = false;
  std::vector<char> stack = std::vector<char>(1 << 16);
};
static std::deque<Thread> threads;
static int active;  // how many of them the block has
static jmp_buf outside;
static void (*body)(void*);
static void* body_arguments;

static void resume(int number) {
  Thread& thread = threads[number];
  threadIdx.x = number;
  if (thread.started) _longjmp(thread.place, 1);
  thread.started = true;
  setcontext(&thread.context);
}

// Lets the next thread run that has not finished, and returns when it is this one's turn again.
static void next_thread(bool done) {
  int me = threadIdx.x, next = me;
  threads[me].finished = done;
  do next = (next + 1) % active;
  while (threads[next].finished && next != me);
  if (next == me && !done) return;
  if (_setjmp(threads[me].place)) return;
  if (next == me) _longjmp(outside, 1);  // the last one has finished
  resume(next);
}

static void __syncthreads() { next_thread(false); }

static void start() {
  for (;;) {
    body(body_arguments);
    next_thread(true);
  }
}

static void run_block() {
  for (int i = 0; i < active; i++) threads[i].finished = false;
  if (!_setjmp(outside)) resume(0);
}

// Returns how many floats behind its shared memory a block has written to.
template <typename F>
static int run(int blocks_x, int blocks_y, int block, int shared, F kernel) {
  int overwritten = 0;
  body = [](void* f) { (*(F*)f)(); };
  body_arguments = &kernel;
  blockDim = {block, 1};
  active = block;
  while ((int)threads.size() < block) {
    threads.emplace_back();
    Thread& thread = threads.back();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    makecontext(&thread.context, start, 0);
  }
  for (int y = 0; y < blocks_y; y++)
    for (int x = 0; x < blocks_x; x++) {
      blockIdx = {x, y};
      // What a kernel reads, it must have written.
      for (int i = 0; i < shared + GUARD; i++) shared_memory[i] = NAN;
      run_block();
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
