// The passes between the matrix products of the distillation losses, on float or double. Rows are given raw; n(x) is
// x / max(|x|, 1e-12), and 0 for x = 0. With D_ij = a_i . b_j over a prefix, cos_ij = D_ij * left_i * right_j.
//
//   block    a block of dot products of every width becomes cosines, the sum of squared errors, or the weights W_ij of
//            the gradient da_i = sum over j of W_ij b_j, for all widths in one pass
//   align    the distance of rows from a teacher's, and its gradient, in one pass
//   finish   takes the part along the rows out of the gradient and adds that of the cosine loss
//
// Sums of a stripe of columns are float in 16 lanes (double: 8), beyond it double, in an order that no thread count
// changes.
#pragma once

#include <cstdint>

namespace leafkern {

constexpr int kDistillStripe = 256;  // columns that one task takes of a block

enum DistillPass {
    kDistillScores,   // dot products -> sum of squared errors, and cosines in their place
    kDistillFused,    // ... and weights in their place
    kDistillWeights,  // cosines and the gradient by them -> weights in their place
};

// Entry (k, i, j) of scores and relative: k * width_stride + i * row_stride + j. Weights of a width are the sum over it
// and all wider ones: what the columns that it adds to the next narrower width are multiplied by.
struct DistillBlock {
    DistillPass pass;
    int widths;
    int64_t rows, columns;
    int64_t width_stride, row_stride, teacher_stride;
    void* scores;
    const void* teacher;   // (rows, columns)
    const void* relative;  // kDistillWeights: gradient by the cosines, above the diagonal only; or null
    // With `mirrored`, the first `rows` columns are the rows' own, and every other entry stands for its mirror image too.
    bool mirrored;
    const void* left;   // inverse norms of the rows, widths `norm_stride` apart
    const void* right;  // of the columns
    int64_t norm_stride;
    double error_scale, relative_scale;  // the slope by a cosine: error_scale * error + relative_scale * relative
    // The last width is 1, and no row's norm below 1e-12: n(x) is a sign there, its gradient exactly 0.
    bool flat;
    // To the sums of slope * cos of each row and of each mirrored column is added; widths `norm_stride` apart.
    double* row_sums;
    double* column_sums;
    double* loss;  // the sum of squared errors over all widths is added
};

struct DistillFinish {
    const void* rows;
    int64_t stride, count, width;
    const int64_t* dims;  // descending
    int widths;
    const void* inverse;  // of the norms of these rows, widths `norm_stride` apart
    const double* sums;   // of slope * cos, widths `norm_stride` apart
    int64_t norm_stride;
    // The cosine loss, unless parts is 0: targets side by side, and inverse norms of the whole rows.
    int parts;
    const void* const* targets;
    const int64_t* target_strides;
    const int64_t* target_widths;
    const void* whole_inverse;
    double slope;     // by the cosine
    double* cosines;  // (count,)
    void* gradient;   // (count, width), added to; null: not wanted
};

enum AlignmentKind { kL2Squared, kL2, kMeanSquared, kCosine };  // the order of KINDS in reference.py

struct DistillAlign {
    AlignmentKind kind;
    bool normalize;  // the rows are compared as n(x)
    int64_t count, width;
    const void* rows;
    const void* teacher;
    int64_t stride, teacher_stride;
    double scale;      // of the sum of distances
    double* distances;  // (count,), without the scale
    void* gradient;    // (count, width), or null
};

// What each instruction set offers for one type.
struct DistillSteps {
    // Columns [begin, end), none or all of them mirrored; sums: the loss, then (widths, rows) of slope * cos.
    void (*stripe)(const DistillBlock& block, int64_t begin, int64_t end, bool mirrored, double* sums);
    void (*finish)(const DistillFinish& arguments, int64_t begin, int64_t end);
    void (*align)(const DistillAlign& arguments, int64_t begin, int64_t end);
};

struct DistillKernels {
    DistillSteps steps[2];  // float, double
};

namespace portable { extern const DistillKernels distill_kernels; }
#if LEAFKERN_X86
namespace avx2 { extern const DistillKernels distill_kernels; }
#endif

// Doubles that distill_block works in.
int64_t distill_workspace(const DistillBlock& block);
void distill_block(const DistillSteps& steps, const DistillBlock& block, double* workspace, int threads);
void distill_finish(const DistillSteps& steps, const DistillFinish& arguments, int threads);
void distill_align(const DistillSteps& steps, const DistillAlign& arguments, int threads);

}  // namespace leafkern
