// Products of one token with planes of codes by looking up sums of two products, 16 at a time (AVX-512).
//
// Two codes of 2 bits make an index of 4 bits, and a register holds the 16 floats that such an index selects
// from: table[c] = a * (c & 3) + b * (c >> 2). One permutation and one addition do what takes two of each and two
// conversions with multiplications, in float32 as there. Other planes become planes of 2 bits on the way: one
// of 1 bit has the codes of two words in its words' even and odd bits; one of 4 bits is two of 2 bits. Multiplying
// (cpu_planes.h) can share the unpacking between tokens, but is slower even with 16 of them.

#pragma once

#include "cpu_planes.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)

#include <immintrin.h>

#define PRINMIX_LOOKUP

constexpr bool LOOKUP = true;
constexpr int TABLES_PER_BLOCK = BLOCK / 2; // of x
constexpr int TABLES_PER_TILE = TILE / 2;   // of t, for a plane of 1 or 2 bits; twice as many for 4 bits
constexpr int BLOCKS_AHEAD = 2;               // fetched into the second level's cache

inline Floats table_of(float a, float b) {
    constexpr Floats low = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
    constexpr Floats high = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    return a * low + b * high;
}

inline Floats look_up(Floats table, __m512i index) {
    return (Floats)_mm512_permutexvar_ps(index, (__m512)table);
}

// Words of 16 bits from bit 4i on, as products' high halves: shifts would wait for the permutations' units.
template <int i> inline __m512i from_nibble(__m512i words) {
    if constexpr (i == 0)
        return words;
    else
        return _mm512_mulhi_epu16(words, _mm512_set1_epi16(int16_t(1 << (16 - 4 * i))));
}

// (bits of a at the mask's ones) | (bits of b at its zeros)
inline __m512i merge(__m512i a, __m512i b, int mask) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi32(mask), a, b, 0xca);
}

// tables: [blocks][16 words of a plane of 2 bits][4]; x: [blocks * 128]
inline void tables_of_x(Floats *tables, const float *x, int blocks) {
    for (int b = 0; b < blocks; b++, x += BLOCK)
        for (int j = 0; j < 16; j++)
            for (int i = 0; i < 4; i++)
                *tables++ = table_of(x[j + 32 * i], x[j + 32 * i + 16]);
}

// total[g][direction] += place * sum_k x[k] q[k][direction], for n directions of each of `group` tiles.
// Every tile's sum has the same order whichever others are computed with it.
template <int width, int group>
inline void look_up_plane(Floats *total, const Plane &plane, int tile, int n, int blocks, const Floats *tables) {
    constexpr int words = 8 * width, steps = std::min(words, 16);
    const __mmask16 valid = (1 << n) - 1;
    const uint16_t *at = plane.tile(tile, blocks);
    const int64_t apart = int64_t(TILE) * blocks * words;
    constexpr int chains = 2; // of additions, for each half of a code of 4 bits
    constexpr int halves = width == 4 ? 2 : 1;
    Floats sums[group][halves][chains] = {};
    const auto add = [&](int g, int half, __m512i word, const Floats *four) __attribute__((always_inline)) {
        sums[g][half][0] += look_up(four[0], word);
        sums[g][half][1] += look_up(four[1], from_nibble<1>(word));
        sums[g][half][0] += look_up(four[2], from_nibble<2>(word));
        sums[g][half][1] += look_up(four[3], from_nibble<3>(word));
    };
    for (int b = 0; b < blocks; b++, at += words * n, tables += TABLES_PER_BLOCK)
        for (int j = 0; j < steps; j++)
#pragma GCC unroll 4
            for (int g = 0; g < group; g++) {
                const auto word = [&](int number) __attribute__((always_inline)) {
                    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, at + g * apart + number * n));
                };
                const __m512i one = word(j);
                __builtin_prefetch(at + (g + group) * apart + j * n, 0, 2); // of the next tiles
                if constexpr (width == 1) {
                    const __m512i bits = _mm512_set1_epi32(0x5555);
                    add(g, 0, _mm512_and_si512(one, bits), tables + 4 * j);
                    add(g, 0, _mm512_and_si512(_mm512_srli_epi32(one, 1), bits), tables + 4 * (j + 8));
                } else if constexpr (width == 2) {
                    add(g, 0, one, tables + 4 * j);
                } else {
                    const __m512i other = word(j + 16);
                    add(g, 0, merge(one, _mm512_slli_epi32(other, 2), 0x3333), tables + 4 * j);
                    add(g, 1, merge(_mm512_srli_epi32(one, 2), other, 0x3333), tables + 4 * j);
                }
            }
    for (int g = 0; g < group; g++)
        for (int half = 0; half < halves; half++)
            total[g] += (sums[g][half][0] + sums[g][half][1]) * (half ? 4 * plane.place : plane.place);
}

// look_up_plane for `tiles` of up to `group` tiles. total: [group]
template <int width, int group>
inline void look_up_tiles(Floats *total, const Plane &plane, int first, int tiles, int blocks, const Floats *tables) {
    const int full = std::min(tiles, plane.directions / TILE - first);
    if (full == group) {
        look_up_plane<width, group>(total, plane, first, TILE, blocks, tables);
        return;
    }
    int i = 0;
    for (; i + 2 <= full; i += 2)
        look_up_plane<width, 2>(total + i, plane, first + i, TILE, blocks, tables);
    for (; i < tiles; i++)
        look_up_plane<width, 1>(total + i, plane, first + i, std::min(TILE, plane.directions - (first + i) * TILE),
                                blocks, tables);
}

// tables: TABLES_PER_TILE for each tile, twice that for a plane of 4 bits; t: of the plane, zero behind the last.
// Returns where the next plane's begin.
inline Floats *tables_of_t(Floats *tables, const float *t, const Plane &plane) {
    for (int first = 0; first < plane.directions; first += TILE)
        for (int half = 0; half < (plane.width == 4 ? 2 : 1); half++) {
            const float place = half ? 4 * plane.place : plane.place;
            for (const float *at = t + first; at < t + first + TILE; at += 4)
                for (int odd = 0; odd < 2; odd++)
                    *tables++ = table_of(at[odd] * place, at[odd + 2] * place);
        }
    return tables;
}

// A tile's block of a plane of 2 bits: rows[r] holds its words 2r and 2r + 1, 16 directions each, and becomes
// directions 2r and 2r + 1, 16 words each, a pair of directions in 32 bits and the words in the order of WORDS.
inline void transpose(__m512i *rows) {
    __m512i pairs[8], fours[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++) {
            fours[i + 2 * k] = _mm512_unpacklo_epi64(pairs[i + k], pairs[i + k + 2]);
            fours[i + 2 * k + 1] = _mm512_unpackhi_epi64(pairs[i + k], pairs[i + k + 2]);
        }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm512_shuffle_i32x4(fours[i], fours[i + 4], 0x88);
        rows[i + 4] = _mm512_shuffle_i32x4(fours[i], fours[i + 4], 0xdd);
    }
}

constexpr Ints WORDS = {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15}; // where each word's result lies

// sums[p][word] += the products of a tile's directions with t, for the block's outputs word + 16p.
inline void combine_tile(Floats *sums, __m512i *rows, const Floats *tables) {
    transpose(rows);
#pragma GCC unroll 4
    for (int q = 0; q < 4; q++) {
        const __m512i a = rows[2 * q], b = rows[2 * q + 1];
        const __m512i even = merge(a, _mm512_slli_epi32(b, 2), 0x33333333);
        const __m512i odd = merge(_mm512_srli_epi32(a, 2), b, 0x33333333);
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++) {
            const Floats table = tables[2 * q + k];
            const __m512i evens = k ? _mm512_srli_epi32(even, 16) : even, odds = k ? _mm512_srli_epi32(odd, 16) : odd;
            sums[0] += look_up(table, evens);
            sums[1] += look_up(table, odds);
            sums[2] += look_up(table, from_nibble<1>(evens));
            sums[3] += look_up(table, from_nibble<1>(odds));
            sums[4] += look_up(table, from_nibble<2>(evens));
            sums[5] += look_up(table, from_nibble<2>(odds));
            sums[6] += look_up(table, from_nibble<3>(evens));
            sums[7] += look_up(table, from_nibble<3>(odds));
            // Not looked up ahead of the additions: GCC would run out of registers.
            asm("" : "+v"(sums[0]), "+v"(sums[1]), "+v"(sums[2]), "+v"(sums[3]));
            asm("" : "+v"(sums[4]), "+v"(sums[5]), "+v"(sums[6]), "+v"(sums[7]));
        }
    }
}

// rows[r]: words 2r and 2r + 1, of n directions each, zero for the others.
template <int count> inline void load_rows(__m512i *rows, const uint16_t *at, int n) {
    if (n == TILE) {
#pragma GCC unroll 8
        for (int r = 0; r < count; r++)
            rows[r] = _mm512_loadu_si512(at + 2 * r * TILE);
        return;
    }
    const __mmask16 valid = (1 << n) - 1;
    for (int r = 0; r < count; r++)
        rows[r] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_loadu_epi16(valid, at + 2 * r * n)),
                                     _mm256_maskz_loadu_epi16(valid, at + (2 * r + 1) * n), 1);
}

// y[128] = sum over planes and directions of place * t[direction] * q[direction][128], for block b.
inline void look_up_block(float *y, const std::vector<Plane> &planes, int blocks, int b, const Floats *tables) {
    Floats sums[8] = {};
    for (const Plane &plane : planes)
        for (int tile = 0; tile * TILE < plane.directions; tile++, tables += TABLES_PER_TILE) {
            const int n = std::min(TILE, plane.directions - tile * TILE);
            const int64_t size = int64_t(8) * plane.width * n;
            const uint16_t *at = plane.tile(tile, blocks) + b * size;
            // For the blocks to come: tiles are too far apart for the hardware to see a pattern.
            if (b + BLOCKS_AHEAD < blocks)
                for (int line = 0; line < size; line += 32)
                    __builtin_prefetch(at + BLOCKS_AHEAD * size + line, 0, 2);
            __m512i rows[8];
            if (plane.width == 2) {
                load_rows<8>(rows, at, n);
            } else if (plane.width == 1) {
                load_rows<4>(rows, at, n);
                const __m512i bits = _mm512_set1_epi32(0x55555555);
                for (int r = 0; r < 4; r++) {
                    rows[r + 4] = _mm512_and_si512(_mm512_srli_epi32(rows[r], 1), bits);
                    rows[r] = _mm512_and_si512(rows[r], bits);
                }
            } else {
                __m512i others[8], high[8];
                load_rows<8>(rows, at, n);
                load_rows<8>(others, at + 16 * n, n);
                for (int r = 0; r < 8; r++) {
                    high[r] = merge(_mm512_srli_epi32(rows[r], 2), others[r], 0x33333333);
                    rows[r] = merge(rows[r], _mm512_slli_epi32(others[r], 2), 0x33333333);
                }
                combine_tile(sums, rows, tables);
                tables += TABLES_PER_TILE;
                std::copy(high, high + 8, rows);
            }
            combine_tile(sums, rows, tables);
        }
    for (int p = 0; p < 8; p++)
        store(y + 16 * p, look_up(sums[p], (__m512i)WORDS));
}

#else

constexpr bool LOOKUP = false;

#endif
