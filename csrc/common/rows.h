// Rows and the inverse norms of their prefixes, on float or double: 1 / max(norm, 1e-12), 0 for a zero row.
#pragma once

#include <cstdint>

namespace leafkern {

struct Rows {
    bool is_double;
    int threads;
    const void* x;  // (rows, dims[0]), entries adjacent, rows `stride` apart
    int64_t rows, stride;
    const int64_t* dims;  // widths of the prefixes, descending
    int64_t widths;
    void* inverse;  // (widths, rows), widths `inverse_stride` apart
    int64_t inverse_stride;
};

struct RowKernels {
    void (*inverse_norms[2])(const Rows& m, int64_t begin, int64_t end);  // float, double
};

namespace portable { extern const RowKernels row_kernels; }
#if LEAFKERN_X86
namespace avx2 { extern const RowKernels row_kernels; }
#endif

void inverse_norms(const RowKernels& kernels, const Rows& m);

}  // namespace leafkern
