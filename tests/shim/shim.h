// Runs CUDA kernels on the CPU: the same source, one block at a time, one fiber for each thread.
//
// A fiber runs until a barrier or a warp operation, then others run, in an order that depends on
// the seed: ascending, descending, shuffled, or shuffled with one warp kept waiting as long as
// others can run. So whoever relies on an order that no barrier gives gets other results. Blocks
// run in shuffled order. Reported as errors: a barrier that not all threads of the block reach, or
// not the same one; a warp operation that a named lane never reaches, or with another mask, or
// another operation. Shared memory is garbage at the start of each block. Not seen: races between
// blocks that would run at the same time, and the memory model.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(threads)
#define __shared__ static __attribute__((section("shared_memory")))

struct Three {
    unsigned x, y, z;
};
static Three threadIdx, blockIdx, gridDim, blockDim;

extern "C" char __start_shared_memory[] __attribute__((visibility("hidden"), weak));
extern "C" char __stop_shared_memory[] __attribute__((visibility("hidden"), weak));

namespace shim {

// ---- switching between stacks -------------------------------------------------------------------

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer in *from and goes on where `to` was saved.
extern "C" void shim_switch(void** from, void* to);
asm(R"(
.text
.local shim_switch
.type shim_switch, @function
shim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

struct Context {
    void* stack_pointer = nullptr;

    void start(char* stack, size_t size, void (*entry)()) {
        const uintptr_t end = reinterpret_cast<uintptr_t>(stack + size) & ~uintptr_t(15);
        auto* top = reinterpret_cast<void**>(end);
        top -= 8;  // six registers, the return address, and the alignment that a call has
        std::memset(top, 0, 8 * sizeof *top);
        top[6] = reinterpret_cast<void*>(entry);
        stack_pointer = top;
    }
};

inline void jump(Context& from, Context& to) { shim_switch(&from.stack_pointer, to.stack_pointer); }
#else
#include <ucontext.h>
struct Context {
    ucontext_t state;

    void start(char* stack, size_t size, void (*entry)()) {
        getcontext(&state);
        state.uc_stack.ss_sp = stack;
        state.uc_stack.ss_size = size;
        state.uc_link = nullptr;
        makecontext(&state, entry, 0);
    }
};

inline void jump(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
#endif

// ---- threads of a block -------------------------------------------------------------------------

constexpr size_t STACK = 1 << 14;

enum State { READY, BARRIER, WARP, DONE };

struct Fiber {
    Context context;
    std::vector<char> stack = std::vector<char>(STACK + 4096);
    State state = READY;
    int line = 0;          // where it waits
    int operation = 0;     // of the warp
    unsigned mask = 0;     // lanes that take part
    uint64_t given = 0;    // to the warp operation
    const uint64_t* taken = nullptr;  // what all lanes gave
};

// What lanes gave to the last warp operations: a lane takes it before it can come to the next one.
struct Given {
    uint64_t lanes[4][32];
    unsigned next = 0;
};

static std::vector<Fiber> fibers;
static std::vector<Given> warps;
static Context scheduler;
static int now;  // the fiber that runs
static uint64_t dice;
static char error[256];
static void (*body)(void*);
static void* body_arguments;

inline uint64_t roll() {  // xorshift64*
    dice ^= dice >> 12;
    dice ^= dice << 25;
    dice ^= dice >> 27;
    return dice * 0x2545F4914F6CDD1Dull;
}

inline void wait(State state, int line) {
    fibers[now].state = state;
    fibers[now].line = line;
    jump(fibers[now].context, scheduler);
}

inline void thread_main() {
    body(body_arguments);
    wait(DONE, 0);
    abort();  // nobody resumes it
}

inline bool fail(const char* what, int thread, int line) {
    std::snprintf(error, sizeof error, "block %u: %s (thread %d, line %d)", blockIdx.x, what,
                  thread, line);
    return false;
}

// Lets the lanes of a warp go on when all that are named have arrived. False for an error.
inline bool release_warp(int thread) {
    Fiber& own = fibers[thread];
    const int first = thread / 32 * 32;
    if (!(own.mask >> (thread % 32) & 1))
        return fail("a lane is not in its own mask", thread, own.line);
    for (int lane = 0; lane < 32; lane++) {
        if (!(own.mask >> lane & 1)) continue;
        if (first + lane >= int(fibers.size()))
            return fail("the mask names no thread", thread, own.line);
        const Fiber& other = fibers[first + lane];
        if (other.state != WARP) return true;
        if (other.mask != own.mask || other.operation != own.operation || other.line != own.line)
            return fail("lanes of a warp meet in different operations", thread, own.line);
    }
    Given& warp = warps[thread / 32];
    uint64_t* all = warp.lanes[warp.next++ % 4];
    for (int lane = 0; lane < 32; lane++) {
        all[lane] = 0;
        if (!(own.mask >> lane & 1)) continue;
        Fiber& other = fibers[first + lane];
        all[lane] = other.given;
        other.taken = all;
        other.state = READY;
    }
    return true;
}

// When nobody can run: all wait at one barrier and pass it, or it is an error.
inline bool release_barrier() {
    int line = 0;
    for (int t = 0; t < int(fibers.size()); t++) {
        const Fiber& f = fibers[t];
        if (f.state == WARP)
            return fail("a warp operation waits for a lane that does not come", t, f.line);
        if (f.state == DONE) continue;
        if (line && f.line != line) return fail("threads wait at different barriers", t, f.line);
        line = f.line;
    }
    for (int t = 0; t < int(fibers.size()); t++)
        if (fibers[t].state == DONE)
            return fail("a thread left while others wait at a barrier", t, line);
    for (Fiber& f : fibers) f.state = READY;
    return true;
}

inline bool run_block(uint64_t order) {
    for (char* at = __start_shared_memory; at != __stop_shared_memory; at++) *at = char(roll());
    for (size_t t = 0; t < fibers.size(); t++) {  // stacks at distances that suit the cache
        fibers[t].state = READY;
        fibers[t].context.start(fibers[t].stack.data() + t * 320 % 4096, STACK, thread_main);
    }
    std::vector<int> ready;
    int late = -1;  // a warp that runs only when no other can, until the next barrier
    for (;;) {
        ready.clear();
        for (int t = 0; t < int(fibers.size()); t++)
            if (fibers[t].state == READY) ready.push_back(t);
        if (ready.empty()) {
            const bool over = std::all_of(fibers.begin(), fibers.end(),
                                          [](const Fiber& f) { return f.state == DONE; });
            if (over) return true;
            if (!release_barrier()) return false;
            late = order % 4 == 3 ? int(roll() % warps.size()) : -1;
            continue;
        }
        if (order % 4 == 1) std::reverse(ready.begin(), ready.end());
        if (order % 4 > 1)
            for (size_t i = ready.size() - 1; i > 0; i--)
                std::swap(ready[i], ready[roll() % (i + 1)]);
        const bool others = std::any_of(ready.begin(), ready.end(),
                                        [late](int t) { return t / 32 != late; });
        for (int t : ready) {
            if (others && t / 32 == late) continue;
            now = t;
            threadIdx = {unsigned(t), 0, 0};
            jump(scheduler, fibers[t].context);
            if (fibers[t].state == WARP && !release_warp(t)) return false;
        }
    }
}

// Runs all blocks; null, or what was wrong.
inline const char* run(long long blocks, int threads, unsigned long long seed, void (*f)(void*),
                       void* arguments) {
    if (int(fibers.size()) != threads) {
        fibers = std::vector<Fiber>(threads);
        warps = std::vector<Given>((threads + 31) / 32);
    }
    dice = seed * 0x9E3779B97F4A7C15ull + 1;
    roll();
    body = f;
    body_arguments = arguments;
    gridDim = {unsigned(blocks), 1, 1};
    blockDim = {unsigned(threads), 1, 1};
    std::vector<unsigned> order(blocks);
    for (long long b = 0; b < blocks; b++) order[b] = unsigned(b);
    for (long long b = blocks - 1; b > 0; b--) std::swap(order[b], order[roll() % (b + 1)]);
    for (unsigned b : order) {
        blockIdx = {b, 0, 0};
        if (!run_block(seed)) return error;
    }
    return nullptr;
}

template <class T> uint64_t packed(T value) {
    static_assert(sizeof value <= 8);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}

template <class T> T unpacked(uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline const uint64_t* meet(int operation, unsigned mask, uint64_t given, int line) {
    Fiber& f = fibers[now];
    f.operation = operation, f.mask = mask, f.given = given;
    wait(WARP, line);
    return fibers[now].taken;
}

}  // namespace shim

// ---- what kernels call --------------------------------------------------------------------------

inline void __syncthreads(int line = __builtin_LINE()) { shim::wait(shim::BARRIER, line); }

inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
    shim::meet(1, mask, 0, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    const uint64_t* all = shim::meet(2, mask, predicate != 0, line);
    unsigned ballot = 0;
    for (int lane = 0; lane < 32; lane++) ballot |= unsigned(all[lane]) << lane;
    return ballot;
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned reach, int line = __builtin_LINE()) {
    const uint64_t* all = shim::meet(3, mask, shim::packed(value), line);
    const unsigned lane = threadIdx.x % 32;
    return lane < reach ? value : shim::unpacked<T>(all[lane - reach]);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int reach, int line = __builtin_LINE()) {
    const uint64_t* all = shim::meet(4, mask, shim::packed(value), line);
    return shim::unpacked<T>(all[(threadIdx.x % 32) ^ reach]);
}

template <class T> T atomicAdd(T* at, T value) {
    const T old = *at;
    *at = old + value;
    return old;
}

template <class T> T atomicMax(T* at, T value) {
    const T old = *at;
    *at = std::max(old, value);
    return old;
}

inline unsigned __float_as_uint(float x) { return shim::unpacked<unsigned>(shim::packed(x)); }
inline float __uint_as_float(unsigned bits) { return shim::unpacked<float>(bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
