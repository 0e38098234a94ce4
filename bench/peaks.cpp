// Loops that keep one execution unit busy from registers or L1: the ceilings that a kernel's speed is set against.
// Built at run time by ceilings.py and called through ctypes; every function returns how many operations it did.

#include <algorithm>
#include <cstdint>
#include <cstring>

#define KEEP(x) asm volatile("" : "+x"(x))

extern "C" int has(const char *isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!std::strcmp(isa, "avx2"))
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt");
    if (!std::strcmp(isa, "avx512"))
        return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vpopcntdq") &&
               __builtin_cpu_supports("avx512bw");
#endif
    (void)isa;
    return 0;
}

extern "C" double read_memory(const uint64_t *data, long words, uint64_t *sink) {
    uint64_t a = 0, b = 0, c = 0, d = 0;
    for (long i = 0; i + 4 <= words; i += 4) a += data[i], b += data[i + 1], c += data[i + 2], d += data[i + 3];
    *sink = a + b + c + d;
    return 8.0 * words;
}

extern "C" double copy_memory(uint64_t *to, const uint64_t *from, long words) {
    std::memcpy(to, from, 8 * words);
    return 16.0 * words;
}

struct Keyed {
    float key;
    int32_t payload;
};

// One thread's std::sort of float keys that carry an index, in `space`, as a plain program would sort scores.
extern "C" double sort_keyed(const float *keys, long count, Keyed *space) {
    for (long i = 0; i < count; ++i) space[i] = {keys[i], int32_t(i)};
    std::sort(space, space + count, [](const Keyed &a, const Keyed &b) { return a.key < b.key; });
    return double(count);
}

#if defined(__x86_64__)
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,fma,popcnt")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vnni,avx512vpopcntdq")))

extern "C" AVX2 double fp32_fma(long rounds, uint64_t *sink) {
    constexpr int N = 12;
    __m256 acc[N], a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(0.25f);
    for (int j = 0; j < N; ++j) acc[j] = _mm256_set1_ps(float(j));
    for (long i = 0; i < rounds; ++i) {
        KEEP(a);
#pragma GCC unroll 12
        for (int j = 0; j < N; ++j) acc[j] = _mm256_fmadd_ps(acc[j], a, b);
    }
    for (int j = 1; j < N; ++j) acc[0] = _mm256_add_ps(acc[0], acc[j]);
    *sink = uint64_t(_mm256_cvtss_f32(acc[0]));
    return 2.0 * 8 * N * rounds;
}

extern "C" AVX2 double int8_maddubs(long rounds, uint64_t *sink) {
    constexpr int N = 8;
    __m256i acc[N], a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-5), one = _mm256_set1_epi16(1);
    for (auto &x : acc) x = _mm256_setzero_si256();
    for (long i = 0; i < rounds; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) {
            KEEP(a);
            acc[j] = _mm256_add_epi32(acc[j], _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), one));
        }
    }
    for (int j = 1; j < N; ++j) acc[0] = _mm256_add_epi32(acc[0], acc[j]);
    *sink = uint64_t(_mm256_extract_epi64(acc[0], 0));
    return 64.0 * N * rounds;
}

// Two products summed in 16 bits before widening: only for operands narrow enough not to saturate.
extern "C" AVX2 double int8_maddubs16(long rounds, uint64_t *sink) {
    constexpr int N = 8;
    __m256i acc[N], a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-5), one = _mm256_set1_epi16(1);
    for (auto &x : acc) x = _mm256_setzero_si256();
    for (long i = 0; i < rounds; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) {
            KEEP(a);
            __m256i first = _mm256_maddubs_epi16(a, b);
            KEEP(a);
            __m256i pair = _mm256_add_epi16(first, _mm256_maddubs_epi16(a, b));
            acc[j] = _mm256_add_epi32(acc[j], _mm256_madd_epi16(pair, one));
        }
    }
    for (int j = 1; j < N; ++j) acc[0] = _mm256_add_epi32(acc[0], acc[j]);
    *sink = uint64_t(_mm256_extract_epi64(acc[0], 0));
    return 128.0 * N * rounds;
}

extern "C" AVX2 double lookups(long rounds, uint64_t *sink) {
    constexpr int N = 8;
    __m256i acc[N], table = _mm256_set1_epi8(7), code = _mm256_set1_epi8(5);
    for (auto &x : acc) x = _mm256_setzero_si256();
    for (long i = 0; i < rounds; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) {
            KEEP(code);
            acc[j] = _mm256_add_epi8(acc[j], _mm256_shuffle_epi8(table, code));
        }
    }
    for (int j = 1; j < N; ++j) acc[0] = _mm256_add_epi8(acc[0], acc[j]);
    *sink = uint64_t(_mm256_extract_epi64(acc[0], 0));
    return 32.0 * N * rounds;
}

namespace {
constexpr int WORDS = 1024;  // 8 KiB: stays in L1
struct Bits {
    alignas(64) uint64_t words[WORDS];
    Bits() {
        uint64_t x = 0x9E3779B97F4A7C15ull;
        for (auto &word : words) word = x = x * 6364136223846793005ull + 1442695040888963407ull;
    }
};
const Bits bits;
}  // namespace

extern "C" AVX2 double popcount_scalar(long rounds, uint64_t *sink) {
    uint64_t a = 0, b = 0, c = 0, d = 0, query = 0x0123456789ABCDEFull;
    for (long i = 0; i < rounds; ++i) {
        asm volatile("" : "+r"(query));
        for (int j = 0; j < WORDS; j += 4) {
            a += uint64_t(_mm_popcnt_u64(bits.words[j] ^ query));
            b += uint64_t(_mm_popcnt_u64(bits.words[j + 1] ^ query));
            c += uint64_t(_mm_popcnt_u64(bits.words[j + 2] ^ query));
            d += uint64_t(_mm_popcnt_u64(bits.words[j + 3] ^ query));
        }
    }
    *sink = a + b + c + d;
    return 64.0 * WORDS * rounds;
}

extern "C" AVX2 double popcount_avx2(long rounds, uint64_t *sink) {
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                           0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i low = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
    __m256i total = zero, query = _mm256_set1_epi64x(0x0123456789ABCDEFll);
    for (long i = 0; i < rounds; ++i) {
        KEEP(query);
        for (int j = 0; j < WORDS / 4; j += 8) {
            __m256i counts = zero;
#pragma GCC unroll 8
            for (int t = 0; t < 8; ++t) {
                __m256i x = _mm256_xor_si256(_mm256_load_si256((const __m256i *)bits.words + j + t), query);
                counts = _mm256_add_epi8(counts, _mm256_shuffle_epi8(table, _mm256_and_si256(x, low)));
                x = _mm256_and_si256(_mm256_srli_epi16(x, 4), low);
                counts = _mm256_add_epi8(counts, _mm256_shuffle_epi8(table, x));
            }
            total = _mm256_add_epi64(total, _mm256_sad_epu8(counts, zero));
        }
    }
    *sink = uint64_t(_mm256_extract_epi64(total, 0));
    return 64.0 * WORDS * rounds;
}

extern "C" AVX512 double int8_vnni(long rounds, uint64_t *sink) {
    constexpr int N = 12;
    __m512i acc[N], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-5);
    for (auto &x : acc) x = _mm512_setzero_si512();
    for (long i = 0; i < rounds; ++i) {
        asm volatile("" : "+v"(a));
#pragma GCC unroll 12
        for (int j = 0; j < N; ++j) acc[j] = _mm512_dpbusd_epi32(acc[j], a, b);
    }
    for (int j = 1; j < N; ++j) acc[0] = _mm512_add_epi32(acc[0], acc[j]);
    *sink = uint64_t(_mm512_reduce_add_epi64(acc[0]));
    return 128.0 * N * rounds;
}

extern "C" AVX512 double popcount_avx512(long rounds, uint64_t *sink) {
    __m512i a = _mm512_setzero_si512(), b = a, query = _mm512_set1_epi64(0x0123456789ABCDEFll);
    for (long i = 0; i < rounds; ++i) {
        asm volatile("" : "+v"(query));
        for (int j = 0; j < WORDS / 8; j += 2) {
            const __m512i *at = (const __m512i *)bits.words + j;
            a = _mm512_add_epi64(a, _mm512_popcnt_epi64(_mm512_xor_si512(_mm512_load_si512(at), query)));
            b = _mm512_add_epi64(b, _mm512_popcnt_epi64(_mm512_xor_si512(_mm512_load_si512(at + 1), query)));
        }
    }
    *sink = uint64_t(_mm512_reduce_add_epi64(_mm512_add_epi64(a, b)));
    return 64.0 * WORDS * rounds;
}
#endif
