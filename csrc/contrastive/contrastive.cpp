// Threads and the order of sums; the steps themselves stand in cpu.inl.
#include "contrastive/contrastive.h"

#include "common/each.h"

namespace leafkern {
namespace {

constexpr int64_t kStripe = 1024;  // columns of one task

}  // namespace

double contrastive_rows(const ContrastiveKernels& kernels, const ContrastiveRows& a) {
    const ContrastiveSteps& steps = kernels.steps[a.is_double];
    const int64_t columns = a.parts[0].count + a.parts[1].count + a.parts[2].count;
    // An exponential costs as much as reading some numbers.
    each(a.threads, a.rows, kGroup, 4 * columns, [&](int64_t begin, int64_t end) { steps.rows(a, begin, end); });
    const int64_t groups = (a.rows + kGroup - 1) / kGroup;
    for (const ContrastivePart& part : a.parts)
        if (part.sums && a.gradient)
            each(a.threads, part.count, kStripe, groups,
                 [&](int64_t begin, int64_t end) { steps.column_sums(part, groups, begin, end); });
    double loss = 0;
    for (int64_t row = 0; row < a.rows; ++row) loss += a.losses[row];
    return a.share * loss;
}

void own_products(const ContrastiveKernels& kernels, const Rows& m, const ContrastiveOwn& own) {
    each(m.threads, m.rows, kGroup, own.count * m.dims[0],
         [&](int64_t begin, int64_t end) { kernels.steps[m.is_double].own_products(m, own, begin, end); });
}

void own_gradients(const ContrastiveKernels& kernels, const Rows& m, const ContrastiveOwn& own) {
    each(m.threads, m.rows, kGroup, own.count * m.dims[0],
         [&](int64_t begin, int64_t end) { kernels.steps[m.is_double].own_gradients(m, own, begin, end); });
}

void project(const ContrastiveKernels& kernels, const Rows& m, const ContrastiveProjection& projection) {
    each(m.threads, m.rows, kGroup, m.dims[0],
         [&](int64_t begin, int64_t end) { kernels.steps[m.is_double].project(m, projection, begin, end); });
}

}  // namespace leafkern
