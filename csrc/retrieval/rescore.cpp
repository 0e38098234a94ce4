// Rescoring over threads, query by query; rows are scored by the kernels that stream them.
#include <algorithm>
#include <atomic>
#include <climits>
#include <functional>

#include "common/pool.h"
#include "retrieval/keys.h"
#include "retrieval/search.h"

#if LEAFKERN_X86
#include <xmmintrin.h>
#endif

namespace leafkern {
namespace {

constexpr int64_t kAhead = 4;             // candidates whose rows are asked for before their turn
constexpr int64_t kThreadWork = 1 << 17;  // products below which a thread is not worth waking

struct Rescoring {
    const FormKernels& form;
    const RescoreArguments& a;
    unsigned char* workspace;
    int slots;
    size_t packed, candidates, keys;  // bytes of a thread's share
    std::atomic<bool> finite{true};

    Rescoring(const SearchKernels& kernels, const RescoreArguments& arguments, unsigned char* space)
        : form(kernels.forms[static_cast<int>(arguments.form)]),
          a(arguments),
          workspace(space),
          packed(aligned(form.packed_size(a.dim, 1))),
          candidates(aligned(sizeof(int64_t) * a.count)),
          keys(aligned(sizeof(int64_t) * a.k)) {
        const int64_t work = a.queries * a.count * a.dim / kThreadWork;
        slots = static_cast<int>(std::clamp<int64_t>(work, 1, std::max(a.threads, 1)));
    }
    size_t share() const { return packed + candidates + keys; }

    void ask_for(int64_t id) const {
#if LEAFKERN_X86
        const char* row = reinterpret_cast<const char*>(a.rows + id * a.stride);
        for (int64_t byte = 0; byte < form.row_bytes(a.dim); byte += 64) _mm_prefetch(row + byte, _MM_HINT_T0);
#else
        (void)id;
#endif
    }

    void rescore(int64_t query, int slot) {
        unsigned char* space = workspace + slot * share();
        int64_t* ids = reinterpret_cast<int64_t*>(space + packed);
        int64_t* best = reinterpret_cast<int64_t*>(space + packed + candidates);
        form.pack(a.dim, a.given + query * a.dim, 1, 0, space);
        // In rising order, as the keeper wants them; those that are none stand first.
        std::copy_n(a.candidates + query * a.count, a.count, ids);
        std::sort(ids, ids + a.count);
        int32_t kept = 0, threshold = INT_MIN;
        Keeper keeper{best, &kept, &threshold, a.k, nullptr};
        if (a.bias != nullptr) keeper.bias = a.bias[query];
        int64_t asked = std::lower_bound(ids, ids + a.count, 0) - ids;
        for (int64_t place = asked; place < a.count; ++place) {
            while (asked < std::min(place + kAhead, a.count)) ask_for(ids[asked++]);
            form.scan(a.dim, space, 1, a.rows + ids[place] * a.stride, a.stride, 1, ids[place], &keeper, nullptr);
        }
        if (!keeper.finite) finite.store(false, std::memory_order_relaxed);
        std::sort(best, best + kept, std::greater<int64_t>());
        for (int place = 0; place < a.k; ++place) {
            const bool found = place < kept;
            a.scores[query * a.k + place] = found ? float_of_key(best[place]) : kNoFloat;
            a.ids[query * a.k + place] = found ? id_of_key(best[place]) : -1;
        }
    }
};

}  // namespace

size_t rescore_workspace(const SearchKernels& kernels, const RescoreArguments& a) {
    const Rescoring rescoring(kernels, a, nullptr);
    return rescoring.share() * rescoring.slots;
}

bool rescore(const SearchKernels& kernels, const RescoreArguments& a, unsigned char* workspace) {
    Rescoring rescoring(kernels, a, workspace);
    parallel(
        rescoring.slots, a.queries,
        [](void* context, int64_t query, int slot) { static_cast<Rescoring*>(context)->rescore(query, slot); },
        &rescoring);
    return rescoring.finite;
}

}  // namespace leafkern
