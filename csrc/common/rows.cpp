// Norms over threads; the kernel stands in cpu.inl.
#include "common/rows.h"

#include "common/each.h"

namespace leafkern {

void inverse_norms(const RowKernels& kernels, const Rows& m) {
    each(m.threads, m.rows, 8, m.dims[0],
         [&](int64_t begin, int64_t end) { kernels.inverse_norms[m.is_double](m, begin, end); });
}

}  // namespace leafkern
