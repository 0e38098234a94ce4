// Instruction sets: what this CPU has, and which one serves.
#pragma once

namespace leafkern {

// Whether the CPU and the operating system support all that the objects of `name` were compiled for.
inline bool has_isa_avx2() {
#if LEAFKERN_X86 && defined(__GNUC__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
#else
    return false;
#endif
}

}  // namespace leafkern
