// What stands between the matrix products of the contrastive losses. The caller forms raw products x_i . y_j of a block
// of rows with all columns; `contrastive_rows` turns them, in place if asked, into the loss and into weights: its
// derivative by the raw products, of which the loss takes cosines x_i . y_j / (|x_i| |y_j|) over a temperature.
//
//   InfoNCE      -(1 - p)^gamma log p of each row's own positive; columns masked by ids and margin
//   soft labels  KL(softmax(teacher) || softmax(cosines))
//
// A prefix of a row is a row with an inverse norm of its own. Raw products grow from the narrowest width to the widest
// (number 0); each width has weights of its own, and when width 0 has its, they become sums over all widths that cover
// a segment of the rows. The gradient of x_i is sum_j weight_ij y_j, segment by segment, less what each width's norm
// projects out, which needs the sums over j of weight * raw: they are formed here for widths 1 and on; for width 0 it
// is what they leave of x_i . gradient. The same for y_j.
//
// Matrices are float or double (`is_double`), sums along a row and down a column double. A row belongs to one task, and
// columns are added up by groups of rows in their order: no result depends on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/rows.h"

namespace leafkern {

constexpr int64_t kGroup = 8;  // rows of one task

struct ContrastivePart {  // columns of one kind
    const void* raw;      // (rows, count), rows `stride` apart
    void* weights;        // the same; may be raw
    const void* inverse;  // of the columns' norms, rows `inverse_stride` apart (0: the same for all rows)
    int64_t count, stride, inverse_stride;
    const int64_t* ids;  // (count,) or null: nothing is masked by ids
    bool maskable;       // by the margin
    void* partial;       // (groups, count) scratch, or null without `sums`
    double* sums;        // (count,): weight * raw is added, or null
};

struct ContrastiveRows {
    bool is_double, gradient;
    int threads;
    int64_t rows;
    const void* inverse;  // (rows,)
    ContrastivePart parts[3];
    double temperature, share;  // the loss is share * the sum over rows
    double* losses;             // (rows,) scratch
    double* sums;               // (rows,) of weight * raw, or null
    // InfoNCE: the own positive of row i is column own + i of the first part
    int64_t own;
    const int64_t* ids;  // (rows,) of the own positives, or null
    bool has_margin;
    double margin, gamma;
    bool detach_focal;
    // Soft labels: (rows, columns of all parts), contiguous; or null
    const void* teacher;
    double teacher_temperature;
    // Of width 0: weights of the first two parts for the other widths, `width_stride` apart, become sums
    int64_t widths, width_stride;
};

struct ContrastiveOwn {  // columns that each row has to itself
    const void* y;       // (rows, count, dims[0])
    int64_t count, row_stride, stride;
    void *raw, *inverse;  // (widths, rows, count)
    const void* weights;  // the same, each width's own
    void* row_gradient;   // (rows, dims[0]) is added to, or null
    int64_t row_gradient_stride;
    void* gradient;  // (rows, count, dims[0]), columns `gradient_stride` apart, is written; or null
    int64_t gradient_stride;
};

struct ContrastiveProjection {
    void* gradient;  // (rows, dims[0]), rows `stride` apart: what the norms project out is taken away
    int64_t stride;
    const double* sums;  // (widths - 1, rows) of weight * raw, widths `sums_stride` apart
    int64_t sums_stride;
};

// What each instruction set offers for one type, for rows (column_sums: columns) begin to end.
struct ContrastiveSteps {
    void (*rows)(const ContrastiveRows& a, int64_t begin, int64_t end);
    void (*column_sums)(const ContrastivePart& part, int64_t groups, int64_t begin, int64_t end);
    void (*own_products)(const Rows& m, const ContrastiveOwn& own, int64_t begin, int64_t end);
    void (*own_gradients)(const Rows& m, const ContrastiveOwn& own, int64_t begin, int64_t end);
    void (*project)(const Rows& m, const ContrastiveProjection& projection, int64_t begin, int64_t end);
};

struct ContrastiveKernels {
    ContrastiveSteps steps[2];  // float, double
};

namespace portable { extern const ContrastiveKernels contrastive_kernels; }
#if LEAFKERN_X86
namespace avx2 { extern const ContrastiveKernels contrastive_kernels; }
#endif

double contrastive_rows(const ContrastiveKernels& kernels, const ContrastiveRows& a);
// Raw products and inverse norms of the own columns.
void own_products(const ContrastiveKernels& kernels, const Rows& m, const ContrastiveOwn& own);
void own_gradients(const ContrastiveKernels& kernels, const Rows& m, const ContrastiveOwn& own);
void project(const ContrastiveKernels& kernels, const Rows& m, const ContrastiveProjection& projection);

}  // namespace leafkern
