// Signs against bits: by counting those that differ, S = D - distance, where tables (bits.inl) don't pay.

int words_of(int dim) { return static_cast<int>(bits_row_bytes(dim) / 8); }

// Whether as many queries are served by counting.
bool counted(int queries) {
#if defined(__AVX2__)
    return queries == 1;
#else
    static_cast<void>(queries);
    return true;
#endif
}

size_t signs_packed_size(int dim, int queries) {
    if (!counted(queries)) return tables_packed_size(dim, queries);
    return aligned((static_cast<size_t>(queries) * words_of(dim) + 2) * 8);
}

size_t signs_scratch_size(int dim, int queries) { return counted(queries) ? 0 : tables_scratch_size(dim, queries); }

// Sign bits of each query, xor-ed with flip, then 16 bytes that mask the unused bits of a row's last 16.
void pack_signs(int dim, const void* given, int queries, uint8_t flip, unsigned char* packed) {
    if (!counted(queries)) return pack_tables<true>(dim, given, queries, flip, packed);
    const int8_t* u = static_cast<const int8_t*>(given);
    const size_t bytes = static_cast<size_t>(words_of(dim)) * 8;
    for (int q = 0; q < queries; ++q) {
        unsigned char* bits = packed + q * bytes;
        std::memset(bits, 0, bytes);
        for (int d = 0; d < dim; ++d)
            if (u[static_cast<int64_t>(q) * dim + d] > 0) bits[d / 8] |= static_cast<unsigned char>(0x80 >> d % 8);
        for (size_t i = 0; i < bytes; ++i) bits[i] ^= flip;
    }
    unsigned char* mask = packed + queries * bytes;
    std::memset(mask, 0, 16);
    for (int d = (dim - 1) / 128 * 128; d < dim; ++d) mask[d % 128 / 8] |= static_cast<unsigned char>(0x80 >> d % 8);
}

#if defined(__AVX2__)

// Bits that are set in each byte.
inline __m256i counts(__m256i x) {
    const __m256i of_four = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                             0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    return _mm256_add_epi8(_mm256_shuffle_epi8(of_four, low_bits(x)), _mm256_shuffle_epi8(of_four, high_bits(x)));
}

// One query. kPieces: 16 bytes each per row, few enough to be summed in 8 bits; 0: as many as D takes.
template <int kPieces>
void count_signs(int dim, const unsigned char* packed, const uint8_t* rows, int64_t stride, int64_t count,
                 int64_t first_id, Keeper* keeper) {
    const int pieces = kPieces > 0 ? kPieces : words_of(dim) / 2;
    const auto both = [](const unsigned char* from) {
        return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    };
    const __m256i mask = both(packed + 16 * pieces), zero = _mm256_setzero_si256();
    // A copy stays in registers.
    __m256i query[kPieces > 0 ? kPieces : 1];
    for (int i = 0; i < kPieces; ++i) query[i] = both(packed + 16 * i);
    // Distances of two rows, each as two sums.
    const auto distances = [&](const uint8_t* first, const uint8_t* second) {
        const auto differ = [&](int i) {
            const __m256i x = _mm256_inserti128_si256(
                _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(first) + i)),
                _mm_loadu_si128(reinterpret_cast<const __m128i*>(second) + i), 1);
            return _mm256_xor_si256(x, kPieces > 0 ? query[i] : both(packed + 16 * i));
        };
        __m256i bytes = counts(_mm256_and_si256(differ(pieces - 1), mask)), sums = zero;
#pragma GCC unroll 8
        for (int i = 0; i < pieces - 1; ++i) {
            bytes = _mm256_add_epi8(bytes, counts(differ(i)));
            if (kPieces == 0) {
                sums = _mm256_add_epi64(sums, _mm256_sad_epu8(bytes, zero));
                bytes = zero;
            }
        }
        return _mm256_add_epi64(sums, _mm256_sad_epu8(bytes, zero));
    };
    const auto needed = [&] {
        return _mm256_set1_epi64x(static_cast<int64_t>(dim) - keeper->thresholds[0]);
    };
    __m256i limit = needed();
    for (int64_t row = 0; row < count; row += 4) {
        // Beyond the end the last row again.
        const uint8_t* at[4];
        for (int i = 0; i < 4; ++i) at[i] = rows + least(row + i, count - 1) * stride;
        const __m256i a = distances(at[0], at[2]), b = distances(at[1], at[3]);
        const __m256i found = _mm256_add_epi64(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
        const __m256i better = _mm256_cmpgt_epi64(limit, found);
        if (_mm256_testz_si256(better, better)) continue;
        int64_t values[4];
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), found);
        for (int64_t i = 0; i < 4 && row + i < count; ++i) {
            const int32_t same = dim - static_cast<int32_t>(values[i]);
            if (same > keeper->thresholds[0]) keep(keeper, 0, same, first_id + row + i);
        }
        limit = needed();
    }
}

void scan_signs(int dim, const unsigned char* packed, int queries, const uint8_t* rows, int64_t stride,
                int64_t count, int64_t first_id, Keeper* keeper, unsigned char* scratch) {
    if (!counted(queries))
        return scan_tables(dim, packed, queries, rows, stride, count, first_id, keeper, scratch);
    const int pieces = words_of(dim) / 2;
    const auto scan = pieces == 1   ? count_signs<1>
                      : pieces == 2 ? count_signs<2>
                      : pieces == 3 ? count_signs<3>
                      : pieces == 4 ? count_signs<4>
                      : pieces == 6 ? count_signs<6>
                      : pieces == 8 ? count_signs<8>
                                    : count_signs<0>;
    scan(dim, packed, rows, stride, count, first_id, keeper);
}

#else

constexpr int kCountedBytes = 16 << 10;  // of base, kept in the first-level cache while all queries pass over it

uint64_t load_word(const uint8_t* bytes) {
    uint64_t word;
    std::memcpy(&word, bytes, 8);
    return word;
}

int popcount(uint64_t x) {
    x -= (x >> 1) & 0x5555555555555555;
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333);
    return static_cast<int>(((x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F) * 0x0101010101010101 >> 56);
}

void scan_signs(int dim, const unsigned char* packed, int queries, const uint8_t* rows, int64_t stride,
                int64_t count, int64_t first_id, Keeper* keeper, unsigned char*) {
    const int words = words_of(dim);
    const uint8_t* mask = packed + static_cast<int64_t>(queries) * words * 8;
    const int64_t block = kCountedBytes / (words * 8) + 1;
    for (int64_t begin = 0; begin < count; begin += block)
        for (int query = 0; query < queries; ++query) {
            const uint8_t* bits = packed + static_cast<int64_t>(query) * words * 8;
            for (int64_t row = begin; row < least(begin + block, count); ++row) {
                const uint8_t* here = rows + row * stride;
                int same = dim;
                for (int w = 0; w < words; ++w) {
                    const uint64_t used = w < words - 2 ? ~0ull : load_word(mask + (w - words + 2) * 8);
                    same -= popcount((load_word(here + w * 8) ^ load_word(bits + w * 8)) & used);
                }
                if (same > keeper->thresholds[query]) keep(keeper, query, same, first_id + row);
            }
        }
}

#endif

constexpr FormKernels kSigns = {bits_stored_bytes, bits_row_bytes, signs_packed_size, signs_scratch_size, pack_signs,
                                scan_signs};
