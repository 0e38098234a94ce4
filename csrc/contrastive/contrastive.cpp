// Threads and the order of sums; the steps themselves stand in cpu.inl.
#include "contrastive/contrastive.h"

#include <algorithm>

#include "common/pool.h"

namespace leafkern {
namespace {

constexpr int64_t kThreadNumbers = 1 << 17;  // below as many, a thread is not worth waking
constexpr int64_t kStripe = 1024;            // columns of one task

// body(begin, end) for tasks of `step` of `count`, each number of which stands for `cost` numbers read.
template <typename Body>
void each(int threads, int64_t count, int64_t step, int64_t cost, const Body& body) {
    struct Context {
        const Body& body;
        int64_t count, step;
    } context{body, count, step};
    const int64_t worth = count * std::max<int64_t>(cost, 1) / kThreadNumbers;
    parallel(
        static_cast<int>(std::clamp<int64_t>(worth, 1, std::max(threads, 1))), (count + step - 1) / step,
        [](void* given, int64_t index, int) {
            const Context& c = *static_cast<const Context*>(given);
            c.body(index * c.step, std::min((index + 1) * c.step, c.count));
        },
        &context);
}

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

void inverse_norms(const ContrastiveKernels& kernels, const ContrastiveMatrix& m) {
    each(m.threads, m.rows, kGroup, m.dims[0],
         [&](int64_t begin, int64_t end) { kernels.steps[m.is_double].inverse_norms(m, begin, end); });
}

void own_products(const ContrastiveKernels& kernels, const ContrastiveMatrix& m, const ContrastiveOwn& own) {
    each(m.threads, m.rows, kGroup, own.count * m.dims[0],
         [&](int64_t begin, int64_t end) { kernels.steps[m.is_double].own_products(m, own, begin, end); });
}

void own_gradients(const ContrastiveKernels& kernels, const ContrastiveMatrix& m, const ContrastiveOwn& own) {
    each(m.threads, m.rows, kGroup, own.count * m.dims[0],
         [&](int64_t begin, int64_t end) { kernels.steps[m.is_double].own_gradients(m, own, begin, end); });
}

void project(const ContrastiveKernels& kernels, const ContrastiveMatrix& m, const ContrastiveProjection& projection) {
    each(m.threads, m.rows, kGroup, m.dims[0],
         [&](int64_t begin, int64_t end) { kernels.steps[m.is_double].project(m, projection, begin, end); });
}

}  // namespace leafkern
