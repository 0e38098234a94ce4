// int8 and int4 by one register tile: 32 dimensions of a base row are decoded to unsigned bytes, multiplied with
// four queries at a time, and the scores compared with the queries' thresholds before anything is stored.

constexpr int kTile = 4;               // queries per register tile
constexpr int kBlockBytes = 16 << 10;  // of decoded base, kept in the first-level cache while all queries pass over it
constexpr int kMaxGroup = 4;           // vectors whose products are summed in 16 bits before widening

int vectors_of(int dim) { return (dim + 31) / 32; }
int block_rows(int dim) {
    const int fitting = kBlockBytes / (vectors_of(dim) * 32);
    return fitting < 4 ? 4 : fitting;
}

// ---- Decoding: 32 dimensions of a row as unsigned bytes. Tables map a place in the decoded vector to a dimension.

struct Int8 {
    static constexpr int kBytes = 32, kLargestCode = 255;
    static int stored(int dim) { return dim; }
    static int dimension(int place) { return place; }
    static int value(const uint8_t* row, int place) { return row[place] ^ 0x80; }
#if defined(__AVX2__)
    static __m256i load(const uint8_t* row) {
        return _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)), _mm256_set1_epi8(-128));
    }
#endif
};

struct Int4 {
    static constexpr int kBytes = 16, kLargestCode = 15;
    static int stored(int dim) { return (dim + 1) / 2; }
    // Even dimensions first: the low nibbles come out together.
    static int dimension(int place) { return place < 16 ? 2 * place : 2 * (place - 16) + 1; }
    static int value(const uint8_t* row, int place) { return place < 16 ? row[place] & 15 : row[place - 16] >> 4; }
#if defined(__AVX2__)
    static __m256i load(const uint8_t* row) {
        const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)));
        const __m256i shifted = _mm256_srlv_epi64(both, _mm256_setr_epi64x(0, 0, 4, 4));
        return _mm256_and_si256(shifted, _mm256_set1_epi8(15));
    }
#endif
};

// Decoded before: where many queries pass over the same rows.
struct Decoded {
    static constexpr int kBytes = 32, kLargestCode = 255;
    static int value(const uint8_t* row, int place) { return row[place]; }
#if defined(__AVX2__)
    static __m256i load(const uint8_t* row) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row));
    }
#endif
};

// ---- Packed queries: per tile, how many vectors may be summed in 16 bits; then, tile by tile, 32 dimensions of each
// of its queries in turn, in the order of the decoded vectors, zeros beyond D.

struct Packed {
    int tiles, vectors;
    const int32_t* groups;
    const int8_t* values;

    Packed(const unsigned char* packed, int dim, int queries)
        : tiles((queries + kTile - 1) / kTile),
          vectors(vectors_of(dim)),
          groups(reinterpret_cast<const int32_t*>(packed)),
          values(reinterpret_cast<const int8_t*>(packed + aligned(sizeof(int32_t) * tiles))) {}
    const int8_t* tile(int t) const { return values + static_cast<int64_t>(t) * kTile * vectors * 32; }
};

// Whether, in every run of `group` vectors from a multiple of it on and every 16-bit lane, neither the positive nor the
// negative values of a query can leave 16 bits, whatever the base holds.
bool safe_in_groups(int group, const int8_t* query, int step, int vectors, int largest) {
    for (int lane = 0; lane < 16; ++lane) {
        int positive = 0, negative = 0;
        for (int v = 0; v < vectors; ++v) {
            if (v % group == 0) positive = negative = 0;
            for (int i = 0; i < 2; ++i) {
                const int u = query[v * step + 2 * lane + i];
                (u > 0 ? positive : negative) += u;
            }
            if (positive * largest > 32767 || negative * largest < -32768) return false;
        }
    }
    return true;
}

template <class Code>
void pack_values(int dim, const void* given, int queries, uint8_t, unsigned char* packed) {
    const int8_t* u = static_cast<const int8_t*>(given);
    const Packed view(packed, dim, queries);
    std::memset(packed, 0, aligned(sizeof(int32_t) * view.tiles) + static_cast<size_t>(view.tiles) * kTile * view.vectors * 32);
    for (int t = 0; t < view.tiles; ++t) {
        const int count = least(kTile, queries - t * kTile);
        int8_t* tile = const_cast<int8_t*>(view.tile(t));
        for (int q = 0; q < count; ++q) {
            const int8_t* query = u + static_cast<int64_t>(t * kTile + q) * dim;
            for (int v = 0; v < view.vectors; ++v)
                for (int place = 0; place < 32; ++place) {
                    const int d = v * 32 + Code::dimension(place);
                    if (d < dim) tile[(v * count + q) * 32 + place] = query[d];
                }
        }
        // One size for the whole tile, tried on every query: a query that is safe in fours need not be so in threes.
        int group = kMaxGroup;
        for (int q = 0; q < count && group > 1;) {
            if (safe_in_groups(group, tile + q * 32, count * 32, view.vectors, Code::kLargestCode)) {
                ++q;
            } else {
                --group;
                q = 0;
            }
        }
        const_cast<int32_t*>(view.groups)[t] = group;
    }
}

// ---- The register tile.

#if defined(__AVX2__)

__m128i sums_of_four(__m256i a, __m256i b, __m256i c, __m256i d) {
    const __m256i sum = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    return _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
}

// Scores of R rows with Q queries, added in 16 bits over groups of G vectors.
template <class Code, int Q, int R, int G>
inline void multiply(const uint8_t* rows, int64_t stride, const int8_t* tile, int vectors, __m128i* sums) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i wide[(Q * R + 3) / 4 * 4];
#pragma GCC unroll 8
    for (__m256i& w : wide) w = _mm256_setzero_si256();
    __m256i narrow[Q * R];
    const auto step = [&](int64_t v, bool first) {
        const __m256i* queries = reinterpret_cast<const __m256i*>(tile) + v * Q;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const __m256i codes = Code::load(rows + r * stride + v * Code::kBytes);
#pragma GCC unroll 8
            for (int q = 0; q < Q; ++q) {
                const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_loadu_si256(queries + q));
                narrow[r * Q + q] = first ? pairs : _mm256_add_epi16(narrow[r * Q + q], pairs);
            }
        }
    };
    const auto widen = [&] {
#pragma GCC unroll 8
        for (int p = 0; p < Q * R; ++p) wide[p] = _mm256_add_epi32(wide[p], _mm256_madd_epi16(narrow[p], ones));
    };
    int64_t v = 0;
    for (; v + G <= vectors; v += G) {
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) step(v + g, g == 0);
        widen();
    }
    if (v < vectors) {
        step(v, true);
        for (++v; v < vectors; ++v) step(v, false);
        widen();
    }
#pragma GCC unroll 8
    for (int p = 0; p < Q * R; p += 4) sums[p / 4] = sums_of_four(wide[p], wide[p + 1], wide[p + 2], wide[p + 3]);
}

template <class Code, int Q, int R, int G>
int64_t scan_rows(const uint8_t* rows, int64_t stride, int64_t row, int64_t count, const int8_t* tile, int vectors,
                  int64_t first_id, Keeper* keeper, int query) {
    constexpr int kSums = (Q * R + 3) / 4;
    __m128i thresholds[kSums];
    const auto refresh = [&] {
        int32_t values[kSums * 4];
        for (int p = 0; p < kSums * 4; ++p) values[p] = p < Q * R ? keeper->thresholds[query + p % Q] : INT_MAX;
        for (int s = 0; s < kSums; ++s) thresholds[s] = _mm_loadu_si128(reinterpret_cast<__m128i*>(values) + s);
    };
    refresh();
    for (; row + R <= count; row += R) {
        const uint8_t* here = rows + row * stride;
        __m128i sums[kSums];
        multiply<Code, Q, R, G>(here, stride, tile, vectors, sums);
        int better = 0;
#pragma GCC unroll 8
        for (int s = 0; s < kSums; ++s)
            better |= _mm_movemask_epi8(_mm_cmpgt_epi32(sums[s], thresholds[s]));
        if (better) {
            int32_t values[kSums * 4];
            for (int s = 0; s < kSums; ++s) _mm_storeu_si128(reinterpret_cast<__m128i*>(values) + s, sums[s]);
            for (int p = 0; p < Q * R; ++p)
                if (values[p] > keeper->thresholds[query + p % Q])
                    keep(keeper, query + p % Q, values[p], first_id + row + p / Q);
            refresh();
        }
    }
    return row;
}

#else

template <class Code, int Q, int R, int G>
int64_t scan_rows(const uint8_t* rows, int64_t stride, int64_t row, int64_t count, const int8_t* tile, int vectors,
                  int64_t first_id, Keeper* keeper, int query) {
    for (; row < count; ++row) {
        int32_t sums[Q] = {};
        for (int v = 0; v < vectors; ++v) {
            uint8_t codes[32];
            for (int i = 0; i < 32; ++i)
                codes[i] = static_cast<uint8_t>(Code::value(rows + row * stride + v * Code::kBytes, i));
            for (int q = 0; q < Q; ++q) {
                const int8_t* values = tile + (v * Q + q) * 32;
                int32_t sum = 0;
                for (int i = 0; i < 32; ++i) sum += codes[i] * values[i];
                sums[q] += sum;
            }
        }
        for (int q = 0; q < Q; ++q)
            if (sums[q] > keeper->thresholds[query + q]) keep(keeper, query + q, sums[q], first_id + row);
    }
    return row;
}

#endif

template <class Code, int Q, int R, int G>
void scan_tile(const uint8_t* rows, int64_t stride, int64_t count, const int8_t* tile, int vectors,
               int64_t first_id, Keeper* keeper, int query) {
    const int64_t row =
        scan_rows<Code, Q, R, G>(rows, stride, 0, count, tile, vectors, first_id, keeper, query);
    if (R > 1) scan_rows<Code, Q, 1, G>(rows, stride, row, count, tile, vectors, first_id, keeper, query);
}

template <class Code, int G>
void scan_group(const uint8_t* rows, int64_t stride, int64_t count, const int8_t* tile, int vectors,
                int64_t first_id, Keeper* keeper, int query, int queries) {
    if (queries >= 4)
        scan_tile<Code, 4, 1, G>(rows, stride, count, tile, vectors, first_id, keeper, query);
    else if (queries == 3)
        scan_tile<Code, 3, 1, G>(rows, stride, count, tile, vectors, first_id, keeper, query);
    else if (queries == 2)
        scan_tile<Code, 2, 2, G>(rows, stride, count, tile, vectors, first_id, keeper, query);
    else
        // Two rows: reading more of them at once, or prefetching, is slower than the hardware's own streams.
        scan_tile<Code, 1, 2, G>(rows, stride, count, tile, vectors, first_id, keeper, query);
}

template <class Code>
void scan_one_tile(const Packed& view, int t, int queries, const uint8_t* rows, int64_t stride,
                   int64_t count, int64_t first_id, Keeper* keeper) {
    // Narrow codes always allow the largest group: 8*63*15 = 7,560.
    constexpr bool kNarrow = Code::kLargestCode < 255;
    const auto scan = view.groups[t] == 4   ? scan_group<Code, 4>
                      : view.groups[t] == 3 ? scan_group<Code, kNarrow ? 4 : 3>
                      : view.groups[t] == 2 ? scan_group<Code, kNarrow ? 4 : 2>
                                            : scan_group<Code, kNarrow ? 4 : 1>;
    const int query = t * kTile;
    scan(rows, stride, count, view.tile(t), view.vectors, first_id, keeper, query, queries - query);
}

template <class Code>
void decode(const uint8_t* rows, int64_t stride, int64_t count, int vectors, uint8_t* decoded) {
    for (int64_t row = 0; row < count; ++row, rows += stride)
        for (int v = 0; v < vectors; ++v, decoded += 32) {
            const uint8_t* here = rows + static_cast<int64_t>(v) * Code::kBytes;
#if defined(__AVX2__)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(decoded), Code::load(here));
#else
            for (int i = 0; i < 32; ++i) decoded[i] = static_cast<uint8_t>(Code::value(here, i));
#endif
        }
}

template <class Code>
void scan_values(int dim, const unsigned char* packed, int queries, const uint8_t* rows, int64_t stride,
                 int64_t count, int64_t first_id, Keeper* keeper, uint8_t* decoded) {
    const Packed view(packed, dim, queries);
    if (view.tiles == 1) return scan_one_tile<Code>(view, 0, queries, rows, stride, count, first_id, keeper);
    const int64_t block = block_rows(dim), width = view.vectors * 32;
    for (int64_t begin = 0; begin < count; begin += block) {
        const int64_t now = least(block, count - begin);
        decode<Code>(rows + begin * stride, stride, now, view.vectors, decoded);
        for (int t = 0; t < view.tiles; ++t)
            scan_one_tile<Decoded>(view, t, queries, decoded, width, now, first_id + begin, keeper);
    }
}

template <class Code>
int64_t values_row_bytes(int dim) {
    return static_cast<int64_t>(vectors_of(dim)) * Code::kBytes;
}

template <class Code>
int64_t values_stored_bytes(int dim) {
    return Code::stored(dim);
}

size_t values_packed_size(int dim, int queries) {
    const size_t tiles = (queries + kTile - 1) / kTile;
    return aligned(sizeof(int32_t) * tiles) + tiles * kTile * vectors_of(dim) * 32;
}

size_t values_scratch_size(int dim, int) { return static_cast<size_t>(block_rows(dim)) * vectors_of(dim) * 32; }

template <class Code>
constexpr FormKernels kValues = {values_stored_bytes<Code>, values_row_bytes<Code>, values_packed_size,
                                 values_scratch_size, pack_values<Code>, scan_values<Code>};
