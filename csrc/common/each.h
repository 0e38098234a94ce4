// Loops over numbers or rows of matrices on the pool's threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/pool.h"

namespace leafkern {

constexpr int64_t kThreadNumbers = 1 << 17;  // below as many, a thread is not worth waking

// body(begin, end) for tasks of `step` of `count`, each of which stands for `cost` numbers read.
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

}  // namespace leafkern
