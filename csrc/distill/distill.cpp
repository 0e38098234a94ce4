// The passes of the distillation losses over threads; the kernels stand in cpu.inl.
#include "distill/distill.h"

#include <algorithm>

#include "common/each.h"

namespace leafkern {
namespace {

constexpr int64_t kRows = 16;  // rows claimed by a thread at a time

int64_t pieces(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Columns before this one are not mirrored.
int64_t own_columns(const DistillBlock& block) { return block.mirrored ? block.rows : block.columns; }

int64_t stripes(const DistillBlock& block) {
    const int64_t own = own_columns(block);
    return pieces(own, kDistillStripe) + pieces(block.columns - own, kDistillStripe);
}

int64_t sums_of_stripe(const DistillBlock& block) { return 1 + block.widths * block.rows; }

struct ByStripes {
    const DistillSteps& steps;
    const DistillBlock& block;
    double* workspace;

    static void run(void* context, int64_t index, int) {
        const ByStripes& self = *static_cast<ByStripes*>(context);
        const int64_t own = own_columns(self.block), before = pieces(own, kDistillStripe);
        const bool mirrored = index >= before;
        const int64_t begin = mirrored ? own + (index - before) * kDistillStripe : index * kDistillStripe;
        const int64_t end = std::min(begin + kDistillStripe, mirrored ? self.block.columns : own);
        self.steps.stripe(self.block, begin, end, mirrored, self.workspace + index * sums_of_stripe(self.block));
    }
};

}  // namespace

int64_t distill_workspace(const DistillBlock& block) { return stripes(block) * sums_of_stripe(block); }

void distill_block(const DistillSteps& steps, const DistillBlock& block, double* workspace, int threads) {
    ByStripes all{steps, block, workspace};
    const int64_t count = stripes(block), size = sums_of_stripe(block);
    parallel(threads, count, all.run, &all);
    const bool weighs = block.pass == kDistillFused || block.pass == kDistillWeights;
    for (int64_t index = 0; index < count; ++index) {
        const double* sums = workspace + index * size;
        *block.loss += sums[0];
        for (int k = 0; weighs && k < block.widths; ++k)
            for (int64_t row = 0; row < block.rows; ++row)
                block.row_sums[k * block.norm_stride + row] += sums[1 + k * block.rows + row];
    }
}

void distill_finish(const DistillSteps& steps, const DistillFinish& arguments, int threads) {
    each(threads, arguments.count, kRows, arguments.width,
         [&](int64_t begin, int64_t end) { steps.finish(arguments, begin, end); });
}

void distill_align(const DistillSteps& steps, const DistillAlign& arguments, int threads) {
    each(threads, arguments.count, kRows, 2 * arguments.width,
         [&](int64_t begin, int64_t end) { steps.align(arguments, begin, end); });
}

}  // namespace leafkern
