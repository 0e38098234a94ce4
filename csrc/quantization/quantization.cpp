// Rows over threads; the kernels stand in cpu.inl.
#include "quantization/quantization.h"

#include <algorithm>
#include <atomic>
#include <limits>

#include "common/each.h"

namespace leafkern {
namespace {

constexpr int64_t kStep = 1 << 16;  // entries claimed by a thread at a time

int64_t rows_at_a_time(const Vectors& x) { return std::max<int64_t>(1, kStep / std::max<int64_t>(x.dim, 1)); }

}  // namespace

bool encode(const QuantizationKernels& kernels, const Vectors& x, const Codes& codes, int threads) {
    std::atomic<bool> good{true};
    each(threads, x.rows, rows_at_a_time(x), x.dim, [&](int64_t begin, int64_t end) {
        if (!kernels.encode(x, codes, begin, end)) good.store(false, std::memory_order_relaxed);
    });
    return good;
}

bool extremes(const QuantizationKernels& kernels, const Vectors& x, int threads, float* found, float* spare) {
    std::atomic<bool> good{true};
    // A share of the rows for each thread: smallest and largest are the same however they are cut.
    const int64_t share = std::max<int64_t>((x.rows + threads - 1) / threads, 1);
    const auto own = [&](int64_t thread) { return spare + thread * 2 * x.dim; };
    for (int64_t i = 0; i < threads; ++i) {
        std::fill_n(own(i), x.dim, std::numeric_limits<float>::infinity());
        std::fill_n(own(i) + x.dim, x.dim, -std::numeric_limits<float>::infinity());
    }
    each(threads, x.rows, share, x.dim, [&](int64_t begin, int64_t end) {
        float* low = own(begin / share);
        if (!kernels.extremes(x, begin, end, low, low + x.dim)) good.store(false, std::memory_order_relaxed);
    });
    std::copy_n(spare, 2 * x.dim, found);
    for (int64_t i = 1; i < threads; ++i)
        for (int64_t d = 0; d < x.dim; ++d) {
            found[d] = std::min(found[d], own(i)[d]);
            found[x.dim + d] = std::max(found[x.dim + d], own(i)[x.dim + d]);
        }
    return good;
}

}  // namespace leafkern
