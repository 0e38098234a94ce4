// Signs against bits: by counting those that differ, S = D - distance, where tables (bits.inl) don't pay.

constexpr int kSignBytes = 16 << 10;  // of base, kept in the first-level cache while all queries pass over it

int words_of(int dim) { return (dim + 63) / 64; }

uint64_t load_word(const uint8_t* bytes) {
    uint64_t word;
    std::memcpy(&word, bytes, 8);
    return word;
}

int popcount(uint64_t x) {
#if defined(__AVX2__)
    return static_cast<int>(_mm_popcnt_u64(x));
#else
    x -= (x >> 1) & 0x5555555555555555;
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333);
    return static_cast<int>(((x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F) * 0x0101010101010101 >> 56);
#endif
}

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
    return aligned((static_cast<size_t>(queries) * words_of(dim) + 1) * 8);
}

size_t signs_scratch_size(int dim, int queries) { return counted(queries) ? 0 : tables_scratch_size(dim, queries); }

// Sign bits of each query, xor-ed with flip, then one word that masks the unused bits of a row's last word.
void pack_signs(int dim, const void* given, int queries, uint8_t flip, unsigned char* packed) {
    if (!counted(queries)) return pack_tables<true>(dim, given, queries, flip, packed);
    const int8_t* u = static_cast<const int8_t*>(given);
    const int words = words_of(dim);
    const size_t bytes = static_cast<size_t>(words) * 8;
    for (int q = 0; q < queries; ++q) {
        unsigned char* bits = packed + q * bytes;
        std::memset(bits, 0, bytes);
        for (int d = 0; d < dim; ++d)
            if (u[static_cast<int64_t>(q) * dim + d] > 0) bits[d / 8] |= static_cast<unsigned char>(0x80 >> d % 8);
        for (size_t i = 0; i < bytes; ++i) bits[i] ^= flip;
    }
    unsigned char* mask = packed + queries * bytes;
    std::memset(mask, 0, 8);
    for (int d = (words - 1) * 64; d < dim; ++d) mask[d % 64 / 8] |= static_cast<unsigned char>(0x80 >> d % 8);
}

// W words per row (0: as many as D takes).
template <int W>
void scan_words(int dim, const uint64_t* packed, int queries, const uint8_t* rows, int64_t stride, int64_t count,
                int64_t first_id, Keeper* keeper) {
    const int n = W > 0 ? W : words_of(dim);
    const uint64_t mask = packed[static_cast<int64_t>(queries) * n];
    const int64_t block = queries == 1 ? count : kSignBytes / (n * 8) + 1;
    for (int64_t begin = 0; begin < count; begin += block) {
        const int64_t end = least(begin + block, count);
        for (int query = 0; query < queries; ++query) {
            const uint64_t* bits = packed + static_cast<int64_t>(query) * n;
            // A copy that compilers know nobody else writes to stays in registers.
            uint64_t copy[W > 0 ? W : 1];
            for (int w = 0; w < W; ++w) copy[w] = bits[w];
            const uint64_t* signs = W > 0 ? copy : bits;
            int32_t threshold = keeper->thresholds[query];
            for (int64_t row = begin; row < end; ++row) {
                const uint8_t* here = rows + row * stride;
                int distance = popcount((load_word(here + (n - 1) * 8) ^ signs[n - 1]) & mask);
#pragma GCC unroll 16
                for (int w = 0; w < n - 1; ++w) distance += popcount(load_word(here + w * 8) ^ signs[w]);
                const int same = dim - distance;
                if (same > threshold) {
                    keep(keeper, query, same, first_id + row);
                    threshold = keeper->thresholds[query];
                }
            }
        }
    }
}

void scan_signs(int dim, const unsigned char* packed, int queries, uint8_t flip, const uint8_t* rows, int64_t stride,
                int64_t count, int64_t first_id, Keeper* keeper, unsigned char* scratch) {
    if (!counted(queries))
        return scan_tables(dim, packed, queries, flip, rows, stride, count, first_id, keeper, scratch);
    const int words = words_of(dim);
    const auto scan = words == 4    ? scan_words<4>
                      : words == 6  ? scan_words<6>
                      : words == 8  ? scan_words<8>
                      : words == 12 ? scan_words<12>
                      : words == 16 ? scan_words<16>
                                    : scan_words<0>;
    scan(dim, reinterpret_cast<const uint64_t*>(packed), queries, rows, stride, count, first_id, keeper);
}

constexpr FormKernels kSigns = {bits_row_bytes, signs_packed_size, signs_scratch_size, pack_signs, scan_signs};
