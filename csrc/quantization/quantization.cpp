// Rows over threads; the kernels stand in cpu.inl.
#include "quantization/quantization.h"

#include <algorithm>
#include <atomic>
#include <limits>

#include "common/each.h"

namespace leafkern {
namespace {

constexpr int64_t kStep = 1 << 16;  // entries claimed by a thread at a time

int64_t rows_at_a_time(const Vectors& x) { return std::max<int64_t>(1, kStep / x.dim); }

}  // namespace

bool encode(const QuantizationKernels& kernels, const Vectors& x, const Codes& codes, int threads) {
    std::atomic<bool> good{true};
    each(threads, x.rows, rows_at_a_time(x), x.dim, [&](int64_t begin, int64_t end) {
        if (!kernels.encode(x, codes, begin, end)) good.store(false, std::memory_order_relaxed);
    });
    return good;
}

bool extremes(const QuantizationKernels& kernels, const Vectors& x, int threads, float* low, float* high,
              float* spare) {
    std::atomic<bool> good{true};
    // One share of the rows each: smallest and largest are the same however they are cut.
    const int64_t share = std::max<int64_t>((x.rows + threads - 1) / threads, 1);
    for (int64_t i = 0; i < threads; ++i) {
        std::fill_n(spare + 2 * i * x.dim, x.dim, std::numeric_limits<float>::infinity());
        std::fill_n(spare + (2 * i + 1) * x.dim, x.dim, -std::numeric_limits<float>::infinity());
    }
    each(threads, x.rows, share, x.dim, [&](int64_t begin, int64_t end) {
        float* own = spare + 2 * (begin / share) * x.dim;
        if (!kernels.extremes(x, begin, end, own, own + x.dim)) good.store(false, std::memory_order_relaxed);
    });
    for (int64_t d = 0; d < x.dim; ++d) {
        low[d] = spare[d];
        high[d] = spare[x.dim + d];
        for (int64_t i = 1; i < threads; ++i) {
            low[d] = std::min(low[d], spare[2 * i * x.dim + d]);
            high[d] = std::max(high[d], spare[(2 * i + 1) * x.dim + d]);
        }
    }
    return good;
}

}  // namespace leafkern
