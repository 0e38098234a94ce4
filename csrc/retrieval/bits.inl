// Bits against 7-bit or sign queries. S is the sum of u*b less the least that it can be: I = 2*S - sum |u|.
//
// Four dimensions of a row are a place in a table of 16 entries that each query brings for them: the group's share of
// S, at most 4*63. Rows are turned so that 32 of them are looked up at once (vpshufb). Entries of a run of groups are
// summed in 8 bits, runs of a segment in 16; packing chooses both by the query itself so that no sum can overflow.
// Turned rows are kept for the next query; for one query they are looked up as they are turned. One query of signs
// counts bits instead: turning the rows would cost more than it saves.

constexpr int kTurned = 16;             // bytes of a row that are turned at once
constexpr int kNibbleBytes = 24 << 10;  // of turned rows, kept in the first-level cache while all queries pass over it
constexpr int kRuns[] = {63, 32, 16, 12, 8, 6, 5, 4, 3, 2, 1};
constexpr int kTurnedRuns[] = {8, 4, 2, 1};  // of one query

int bytes_of(int dim) { return (dim + 7) / 8; }
int groups_of(int dim) { return 2 * bytes_of(dim); }

int64_t bits_stored_bytes(int dim) { return bytes_of(dim); }
int64_t bits_row_bytes(int dim) { return (bytes_of(dim) + kTurned - 1) / kTurned * kTurned; }

// How many times 32 rows are turned together: they share each table that is loaded.
int parts_of(int dim) {
    const int bytes = groups_of(dim) * 32;
    return bytes * 4 <= kNibbleBytes ? 4 : bytes * 2 <= kNibbleBytes ? 2 : 1;
}

struct Runs {
    int32_t run, segment;  // groups; a segment is a multiple of a run, or all
};

// Per query its Runs; then, query by query, a table for every group: first the four dimensions of a byte's high bits.
struct Tables {
    int groups, stride;  // tables of one query: as many as it has groups, and zeros up to whole turns
    const Runs* runs;
    const uint8_t* entries;

    Tables(const unsigned char* packed, int dim, int queries)
        : groups(groups_of(dim)),
          stride(static_cast<int>(2 * bits_row_bytes(dim))),
          runs(reinterpret_cast<const Runs*>(packed)),
          entries(packed + aligned(sizeof(Runs) * queries)) {}
    const uint8_t* of(int query) const { return entries + static_cast<int64_t>(query) * stride * 16; }
};

size_t tables_packed_size(int dim, int queries) {
    return aligned(sizeof(Runs) * queries) + static_cast<size_t>(queries) * 2 * bits_row_bytes(dim) * 16;
}

size_t tables_scratch_size(int dim, int) {
    return static_cast<size_t>(parts_of(dim)) * 32 * (groups_of(dim) + bits_row_bytes(dim));
}

// The longest of the runs given, falling to 1, that no rows can make overflow.
template <int kCount>
Runs longest(const int (&lengths)[kCount], const uint8_t* tables, int groups) {
    int total = 0, chosen = 0, sums[kCount] = {};
    bool unsafe[kCount] = {};
    for (int group = 0; group < groups; ++group) {
        // Entries of opposite places add up to sum |u|, the largest.
        const int largest = tables[group * 16] + tables[group * 16 + 15];
        total += largest;
        for (int i = chosen; i < kCount; ++i) {
            sums[i] = (group % lengths[i] == 0 ? 0 : sums[i]) + largest;
            if (sums[i] > 255) unsafe[i] = true;
        }
        while (chosen < kCount - 1 && unsafe[chosen]) ++chosen;
    }
    // 260 groups of at most 4*63 stay below 2^16 - 1.
    return {lengths[chosen], total < 65535 ? groups : 260 / lengths[chosen] * lengths[chosen]};
}

template <bool kSigns>
void pack_tables(int dim, const void* given, int queries, uint8_t flip, unsigned char* packed) {
    const Tables view(packed, dim, queries);
    const int8_t* u = static_cast<const int8_t*>(given);
    for (int query = 0; query < queries; ++query, u += dim) {
        uint8_t* tables = const_cast<uint8_t*>(view.of(query));
        for (int group = 0; group < view.groups; ++group) {
            int values[4], sums[16] = {};
            for (int i = 0; i < 4; ++i) {
                const int d = 4 * group + i;
                values[i] = d >= dim ? 0 : kSigns ? (u[d] > 0 ? 1 : -1) : u[d];
                sums[0] -= values[i] < 0 ? values[i] : 0;
            }
            for (int place = 1; place < 16; ++place) {
                // The lowest bit's dimension, which comes last, beside the other bits.
                const int last = place & 1 ? 3 : place & 2 ? 2 : place & 4 ? 1 : 0;
                sums[place] = sums[place & (place - 1)] + values[last];
            }
            // Flipped bits swap entries.
            const int flipped = flip >> (group % 2 == 0 ? 4 : 0) & 15;
            for (int place = 0; place < 16; ++place)
                tables[group * 16 + (place ^ flipped)] = static_cast<uint8_t>(sums[place]);
        }
        std::memset(tables + view.groups * 16, 0, (view.stride - view.groups) * 16);
        const_cast<Runs*>(view.runs)[query] = queries == 1 ? longest(kTurnedRuns, tables, view.groups)
                                                           : longest(kRuns, tables, view.groups);
    }
}

#if defined(__AVX2__)

// A step of two in turning: the bytes of a, b, c and d one by one.
inline void interleave(__m256i a, __m256i b, __m256i c, __m256i d, __m256i* out) {
    const __m256i ac = _mm256_unpacklo_epi8(a, c), more_ac = _mm256_unpackhi_epi8(a, c);
    const __m256i bd = _mm256_unpacklo_epi8(b, d), more_bd = _mm256_unpackhi_epi8(b, d);
    out[0] = _mm256_unpacklo_epi8(ac, bd);
    out[1] = _mm256_unpackhi_epi8(ac, bd);
    out[2] = _mm256_unpacklo_epi8(more_ac, more_bd);
    out[3] = _mm256_unpackhi_epi8(more_ac, more_bd);
}

// Calls use(byte, rows' bytes of that place) for 32 rows in their order, from `begin` to kTurned bytes on or `end`,
// four places at a time.
template <typename Use>
inline void turn(const uint8_t* rows, int64_t stride, int begin, int end, const Use& use) {
    // Rows i and i + 16 in the two halves.
    const auto load = [&](int i) {
        const __m128i* low = reinterpret_cast<const __m128i*>(rows + i * stride + begin);
        const __m128i* high = reinterpret_cast<const __m128i*>(rows + (i + 16) * stride + begin);
        return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(low)), _mm_loadu_si128(high), 1);
    };
    __m256i half[16];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) interleave(load(i), load(i + 4), load(i + 8), load(i + 12), half + 4 * i);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        if (begin + 4 * i >= end) break;
        __m256i turned[4];
        interleave(half[i], half[i + 4], half[i + 8], half[i + 12], turned);
        use(begin + 4 * i, turned);
    }
}

inline __m256i high_bits(__m256i x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)); }
inline __m256i low_bits(__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }

// Four bits of each of 32*kParts rows to a byte: for each group, kParts times 32 rows.
template <int kParts>
void store_turned(const uint8_t* rows, int64_t stride, int bytes, uint8_t* nibbles) {
    for (int part = 0; part < kParts; ++part)
        for (int begin = 0; begin < bytes; begin += kTurned)
            turn(rows + part * 32 * stride, stride, begin, bytes, [&](int place, const __m256i* turned) {
                __m256i* out = reinterpret_cast<__m256i*>(nibbles) + 2 * place * kParts + part;
                for (int i = 0; i < least(4, bytes - place); ++i, out += 2 * kParts) {
                    _mm256_storeu_si256(out, high_bits(turned[i]));
                    _mm256_storeu_si256(out + kParts, low_bits(turned[i]));
                }
            });
}

// 16-bit sums of bytes: `all` holds those at odd places too, times 256.
struct Sums {
    __m256i all, odd;

    void clear() { all = odd = _mm256_setzero_si256(); }
    void add(__m256i bytes) {
        all = _mm256_add_epi16(all, bytes);
        odd = _mm256_add_epi16(odd, _mm256_srli_epi16(bytes, 8));
    }
    __m256i even() const { return _mm256_sub_epi16(all, _mm256_slli_epi16(odd, 8)); }
};

inline __m256i entries(const uint8_t* tables, int64_t group, __m256i places) {
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(tables) + group);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), places);
}

// S of 32 rows, looked up as they are turned: even rows in low, odd ones in high.
template <int kRun>
void look_up_turning(const uint8_t* rows, int64_t stride, int bytes, const uint8_t* tables, __m256i* low,
                     __m256i* high) {
    Sums sums;
    sums.clear();
    for (int begin = 0; begin < bytes; begin += kTurned)
        turn(rows, stride, begin, bytes, [&](int place, const __m256i* turned) {
            __m256i found[8];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                found[2 * i] = entries(tables, 2 * (place + i), high_bits(turned[i]));
                found[2 * i + 1] = entries(tables, 2 * (place + i) + 1, low_bits(turned[i]));
            }
#pragma GCC unroll 8
            for (int i = 0; i < 8; i += kRun) {
#pragma GCC unroll 8
                for (int j = 1; j < kRun; ++j) found[i] = _mm256_add_epi8(found[i], found[i + j]);
                sums.add(found[i]);
            }
        });
    *low = sums.even();
    *high = sums.odd;
}

// S of 32*kParts rows over `groups` groups: even rows in low, odd ones in high. kRun 0: runs of `run`.
template <int kParts, int kRun>
inline void look_up(const uint8_t* nibbles, const uint8_t* tables, int64_t groups, int64_t run, __m256i* low,
                    __m256i* high) {
    Sums sums[kParts];
    __m256i bytes[kParts];
#pragma GCC unroll 4
    for (Sums& each : sums) each.clear();
    const auto add = [&](int64_t group, bool first) {
        const __m256i* places = reinterpret_cast<const __m256i*>(nibbles) + group * kParts;
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
            const __m256i found = entries(tables, group, _mm256_loadu_si256(places + part));
            bytes[part] = first ? found : _mm256_add_epi8(bytes[part], found);
        }
    };
    const auto widen = [&] {
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) sums[part].add(bytes[part]);
    };
    int64_t group = 0;
    const int64_t step = kRun > 0 ? kRun : run;
    for (; group + step <= groups; group += step) {
        add(group, true);
#pragma GCC unroll 4
        for (int64_t i = 1; i < step; ++i) add(group + i, false);
        widen();
    }
    if (group < groups) {
        add(group, true);
        for (++group; group < groups; ++group) add(group, false);
        widen();
    }
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
        low[part] = sums[part].even();
        high[part] = sums[part].odd;
    }
}

template <int kParts>
inline void look_up_runs(const uint8_t* nibbles, const uint8_t* tables, int64_t groups, int run, __m256i* low,
                         __m256i* high) {
    switch (run) {
        case 1: return look_up<kParts, 1>(nibbles, tables, groups, run, low, high);
        case 2: return look_up<kParts, 2>(nibbles, tables, groups, run, low, high);
        case 3: return look_up<kParts, 3>(nibbles, tables, groups, run, low, high);
        case 4: return look_up<kParts, 4>(nibbles, tables, groups, run, low, high);
        default: return look_up<kParts, 0>(nibbles, tables, groups, run, low, high);
    }
}

// Keeps those of 32 rows whose S is above the threshold; values: even rows first, then odd ones.
void keep_some(uint32_t candidates, const uint16_t* values, int64_t first_id, Keeper* keeper, int query) {
    for (; candidates; candidates &= candidates - 1) {
        const int row = _mm_popcnt_u32((candidates & (0u - candidates)) - 1);
        const int32_t value = values[row % 2 * 16 + row / 2];
        if (value > keeper->thresholds[query]) keep(keeper, query, value, first_id + row);
    }
}

// Offers S of 32*kParts rows, of which there are `count`.
template <int kParts>
inline void keep_better(const __m256i* low, const __m256i* high, int64_t count, int64_t first_id, Keeper* keeper,
                        int query) {
    __m256i best = _mm256_max_epu16(low[0], high[0]);
    for (int part = 1; part < kParts; ++part)
        best = _mm256_max_epu16(best, _mm256_max_epu16(low[part], high[part]));
    const int32_t threshold = keeper->thresholds[query];
    const __m256i needed = _mm256_set1_epi16(static_cast<short>(threshold < 0 ? 0 : least(threshold + 1, 65535)));
    const auto enough = [&](__m256i x) { return _mm256_cmpeq_epi16(_mm256_max_epu16(x, needed), x); };
    if (_mm256_testz_si256(enough(best), enough(best))) return;
    for (int part = 0; part < kParts && part * 32 < count; ++part) {
        const __m256i odd = _mm256_set1_epi16(static_cast<short>(0xFF00));
        uint32_t found = _mm256_movemask_epi8(_mm256_blendv_epi8(enough(low[part]), enough(high[part]), odd));
        if (count < part * 32 + 32) found &= (1u << (count - part * 32)) - 1;
        if (!found) continue;
        uint16_t values[32];
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), low[part]);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + 16), high[part]);
        keep_some(found, values, first_id + part * 32, keeper, query);
    }
}

template <int kParts>
void scan_segment(const uint8_t* nibbles, const uint8_t* tables, Runs runs, int64_t groups, int64_t count,
                  int64_t first_id, Keeper* keeper, int query) {
    __m256i low[kParts], high[kParts];
    look_up_runs<kParts>(nibbles, tables, groups, runs.run, low, high);
    keep_better<kParts>(low, high, count, first_id, keeper, query);
}

// Where 16 bits don't hold the sum of all groups.
template <int kParts>
void scan_segments(const uint8_t* nibbles, const uint8_t* tables, Runs runs, int64_t groups, int64_t count,
                   int64_t first_id, Keeper* keeper, int query) {
    int32_t sums[kParts * 32] = {};
    for (int64_t begin = 0; begin < groups; begin += runs.segment) {
        __m256i low[kParts], high[kParts];
        look_up_runs<kParts>(nibbles + begin * kParts * 32, tables + begin * 16,
                             least<int64_t>(runs.segment, groups - begin), runs.run, low, high);
        for (int part = 0; part < kParts; ++part) {
            uint16_t values[32];
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), low[part]);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + 16), high[part]);
            for (int row = 0; row < 32; ++row) sums[part * 32 + row] += values[row % 2 * 16 + row / 2];
        }
    }
    for (int64_t row = 0; row < count; ++row)
        if (sums[row] > keeper->thresholds[query]) keep(keeper, query, sums[row], first_id + row);
}

// The first of `size` rows, of which there are `count`: copied to space where they are fewer, beside whatever stands
// there from before.
const uint8_t* whole(const uint8_t* rows, int64_t* stride, int64_t size, int64_t count, int bytes, uint8_t* space) {
    if (count >= size) return rows;
    const int64_t width = (bytes + kTurned - 1) / kTurned * kTurned;
    for (int64_t row = 0; row < count; ++row) std::memcpy(space + row * width, rows + row * *stride, bytes);
    *stride = width;
    return space;
}

// Brings rows into the cache. They are turned in an order that the hardware's prefetching does not see through, nor do
// prefetch instructions help as much.
void touch(const uint8_t* rows, int64_t stride, int64_t count, int bytes) {
    for (int64_t row = 0; row < count; ++row, rows += stride)
        for (int i = 0; i < bytes; i += 64) static_cast<void>(*const_cast<const volatile uint8_t*>(rows + i));
}

template <int kParts>
void scan_parts(const Tables& view, int bytes, int queries, const uint8_t* rows, int64_t stride, int64_t count,
                int64_t first_id, Keeper* keeper, uint8_t* nibbles) {
    constexpr int kRows = 32 * kParts;
    for (int64_t begin = 0; begin < count; begin += kRows) {
        const int64_t now = least<int64_t>(kRows, count - begin);
        int64_t step = stride;
        touch(rows + begin * stride, stride, now, bytes);
        const uint8_t* here = whole(rows + begin * stride, &step, kRows, now, bytes, nibbles + kRows * view.groups);
        store_turned<kParts>(here, step, bytes, nibbles);
        for (int query = 0; query < queries; ++query) {
            const Runs runs = view.runs[query];
            const auto scan = runs.segment == view.groups ? scan_segment<kParts> : scan_segments<kParts>;
            scan(nibbles, view.of(query), runs, view.groups, now, first_id + begin, keeper, query);
        }
    }
}

template <int kRun>
void scan_turning(const Tables& view, int bytes, const uint8_t* rows, int64_t stride, int64_t count, int64_t first_id,
                  Keeper* keeper, uint8_t* space) {
    for (int64_t begin = 0; begin < count; begin += 32) {
        const int64_t now = least<int64_t>(32, count - begin);
        touch(rows + begin * stride, stride, now, bytes);
        int64_t step = stride;
        const uint8_t* here = whole(rows + begin * stride, &step, 32, now, bytes, space);
        __m256i low, high;
        look_up_turning<kRun>(here, step, bytes, view.of(0), &low, &high);
        keep_better<1>(&low, &high, now, first_id + begin, keeper, 0);
    }
}

void scan_tables(int dim, const unsigned char* packed, int queries, const uint8_t* rows, int64_t stride,
                 int64_t count, int64_t first_id, Keeper* keeper, unsigned char* space) {
    const Tables view(packed, dim, queries);
    const int bytes = bytes_of(dim), parts = parts_of(dim), run = view.runs[0].run;
    if (queries == 1 && view.runs[0].segment == view.groups) {
        const auto scan = run == 8   ? scan_turning<8>
                          : run == 4 ? scan_turning<4>
                          : run == 2 ? scan_turning<2>
                                     : scan_turning<1>;
        return scan(view, bytes, rows, stride, count, first_id, keeper, space);
    }
    const auto scan = parts == 4 ? scan_parts<4> : parts == 2 ? scan_parts<2> : scan_parts<1>;
    scan(view, bytes, queries, rows, stride, count, first_id, keeper, space);
}

#else

void scan_tables(int dim, const unsigned char* packed, int queries, const uint8_t* rows, int64_t stride,
                 int64_t count, int64_t first_id, Keeper* keeper, unsigned char* nibbles) {
    const Tables view(packed, dim, queries);
    const int64_t block = static_cast<int64_t>(parts_of(dim)) * 32;
    for (int64_t begin = 0; begin < count; begin += block) {
        const int64_t now = least(block, count - begin);
        for (int64_t row = 0; row < now; ++row)
            for (int group = 0; group < view.groups; ++group)
                nibbles[row * view.groups + group] =
                    rows[(begin + row) * stride + group / 2] >> (group % 2 == 0 ? 4 : 0) & 15;
        for (int query = 0; query < queries; ++query) {
            const uint8_t* tables = view.of(query);
            for (int64_t row = 0; row < now; ++row) {
                int32_t sum = 0;
                for (int group = 0; group < view.groups; ++group)
                    sum += tables[group * 16 + nibbles[row * view.groups + group]];
                if (sum > keeper->thresholds[query]) keep(keeper, query, sum, first_id + begin + row);
            }
        }
    }
}

#endif

constexpr FormKernels kBits = {bits_stored_bytes, bits_row_bytes, tables_packed_size, tables_scratch_size,
                               pack_tables<false>, scan_tables};
