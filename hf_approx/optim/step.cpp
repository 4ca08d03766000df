// AvaGrad's step on a CPU: every weight, its gradient and its moments are read once and written once, by all threads,
// in one parallel region for all tensors of a batch. Built by native.py, which has the order of `Rule`.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t BLOCK = 1024;  // elements; its rates, on the stack, stay in the first cache

struct Rule {
    double beta1, beta2, eps, l2, decay, maximize, root, correction, moves, norm_root, norm_of_old;
};

struct bfloat16 {
    uint16_t bits;
};

template <typename T>
T wide(T x) {
    return x;
}

float wide(bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

template <typename T>
void store(T& to, T x) {
    to = x;
}

void store(bfloat16& to, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    to.bits = uint16_t(x == x ? rounded : 0x7fc0);
}

template <typename T>
T rate(T square, T scale, T eps) {
    return T(1) / (std::sqrt(square) * scale + eps);
}

// Not inlined: whichever pass filled the numbers, equal ones have a sum equal to the last bit.
template <typename T>
__attribute__((noinline)) double sum_of_squares(const T* numbers, int64_t count) {
    double sum = 0;
    for (int64_t first = 0; first < count; first += 256) {
        T few = 0;  // few enough for the sum to keep its digits
        const int64_t end = std::min(first + 256, count);
#pragma omp simd reduction(+ : few)
        for (int64_t i = first; i < end; i++) few += numbers[i] * numbers[i];
        sum += few;
    }
    return sum;
}

// Calls work(tensor, first, count, rates) for each block of every tensor; it fills `rates`. Returns the sum of their
// squares, added up in the same order whatever the number of threads.
template <typename T, typename Work>
double for_each_block(int64_t tensors, const int64_t* numels, int threads, Work work) {
    std::vector<int64_t> ends(tensors);
    int64_t blocks = 0;
    for (int64_t k = 0; k < tensors; k++) ends[k] = blocks += (numels[k] + BLOCK - 1) / BLOCK;
    std::vector<double> sums(blocks);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < blocks; block++) {
        T rates[BLOCK];
        int64_t k = std::upper_bound(ends.begin(), ends.end(), block) - ends.begin();
        int64_t first = (block - (k ? ends[k - 1] : 0)) * BLOCK;
        int64_t count = std::min(BLOCK, numels[k] - first);
        work(k, first, count, rates);
        sums[block] = sum_of_squares(rates, count);
    }
    double sum = 0;
    for (double part : sums) sum += part;
    return sum;
}

template <typename T>
struct Constants {
    T one_minus_beta1, beta2, one_minus_beta2, eps, l2, sign, scale, norm_scale, shrink, size;
};

template <typename P, typename T, bool MOVES, bool NORM_OF_OLD>
void step_block(int64_t count, P* __restrict weights, const P* __restrict gradients, T* __restrict means,
                T* __restrict squares, T* __restrict rates, const Constants<T> given) {
    const Constants<T> c = given;
    const bool adds_l2 = c.l2 != 0;  // an infinite weight times a decay of zero would be no number
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        const T weight = wide(weights[i]), old = squares[i];
        const T gradient = c.sign * wide(gradients[i]) + (adds_l2 ? c.l2 * weight : T(0));
        const T mean = means[i] + c.one_minus_beta1 * (gradient - means[i]);
        const T square = c.beta2 * old + c.one_minus_beta2 * gradient * gradient;
        if (MOVES) store(weights[i], c.shrink * weight - c.size * rate(old, c.scale, c.eps) * mean);
        means[i] = mean;
        squares[i] = square;
        rates[i] = rate(NORM_OF_OLD ? old : square, c.norm_scale, c.eps);
    }
}

// Pointers: those of all weights, then of all gradients, of all means, of all squares.
template <typename P, typename T, bool MOVES, bool NORM_OF_OLD>
double step(int64_t tensors, void** pointers, const int64_t* numels, const Rule& rule, double gamma, double lr,
            int threads) {
    const Constants<T> c = {T(1 - rule.beta1),        T(rule.beta2),      T(1 - rule.beta2),
                            T(rule.eps),              T(rule.l2),         T(rule.maximize ? -1 : 1),
                            T(1 / rule.root),         T(1 / rule.norm_root), T(1 - lr * rule.decay),
                            T(lr / rule.correction * gamma)};
    return for_each_block<T>(tensors, numels, threads, [=](int64_t k, int64_t first, int64_t count, T* rates) {
        step_block<P, T, MOVES, NORM_OF_OLD>(count, (P*)pointers[k] + first, (P*)pointers[tensors + k] + first,
                                             (T*)pointers[2 * tensors + k] + first,
                                             (T*)pointers[3 * tensors + k] + first, rates, c);
    });
}

template <typename T>
double norm(int64_t tensors, void** pointers, const int64_t* numels, double root, double eps, int threads) {
    return for_each_block<T>(tensors, numels, threads, [=](int64_t k, int64_t first, int64_t count, T* rates) {
        const T* __restrict squares = (T*)pointers[k] + first;
#pragma omp simd
        for (int64_t i = 0; i < count; i++) rates[i] = rate(squares[i], T(1 / root), T(eps));
    });
}

}  // namespace

#define STEP(NAME, P, T)                                                                                           \
    extern "C" void NAME(int64_t tensors, void** pointers, const int64_t* numels, const Rule* rule,                \
                         const double* gamma, const double* lr, double* sum, int threads) {                        \
        auto run = rule->norm_of_old ? (rule->moves ? step<P, T, true, true> : step<P, T, false, true>)            \
                                     : (rule->moves ? step<P, T, true, false> : step<P, T, false, false>);         \
        *sum = run(tensors, pointers, numels, *rule, *gamma, *lr, threads);                                        \
    }

#define NORM(NAME, T)                                                                                              \
    extern "C" void NAME(int64_t tensors, void** pointers, const int64_t* numels, double root, double eps,         \
                         double* sum, int threads) {                                                               \
        *sum = norm<T>(tensors, pointers, numels, root, eps, threads);                                             \
    }

STEP(step_float32, float, float)
STEP(step_float64, double, double)
STEP(step_bfloat16, bfloat16, float)
NORM(norm_float32, float)
NORM(norm_float64, double)
