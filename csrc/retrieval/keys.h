// Keys of the selection, for what is compiled once: not for the kernels, of which there is a copy per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace leafkern {

// A key's id, and the bits of its score where that is a float; the bits of -infinity, where there is none.
inline int64_t id_of_key(int64_t key) { return 0xFFFFFFFFll - (key & 0xFFFFFFFFll); }
inline int32_t float_of_key(int64_t key) {
    const int32_t score = static_cast<int32_t>(key >> 32);
    return score ^ (score >> 31 & 0x7FFFFFFF);
}
constexpr int32_t kNoFloat = static_cast<int32_t>(0xFF800000);

inline size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace leafkern
