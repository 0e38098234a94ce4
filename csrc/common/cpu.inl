// The norms of rows, compiled once per instruction set into namespace LEAFKERN_ISA.
#include <math.h>

#include "common/rows.h"

namespace leafkern {
namespace LEAFKERN_ISA {
namespace {

#include "common/rows.inl"

template <typename T>
void inverse_norms(const Rows& m, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const T* x = row_of<T>(m.x, row, m.stride);
        double squares = 0;
        for (int64_t width = m.widths - 1; width >= 0; --width) {
            const int64_t first = narrower(m.dims, m.widths, width);
            squares += sum_of_squares(x + first, m.dims[width] - first);
            row_of<T>(m.inverse, width, m.inverse_stride)[row] = inverse_norm<T>(squares);
        }
    }
}

}  // namespace

extern const RowKernels row_kernels;
const RowKernels row_kernels = {{inverse_norms<float>, inverse_norms<double>}};

}  // namespace LEAFKERN_ISA
}  // namespace leafkern
