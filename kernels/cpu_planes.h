// Products with planes of codes (docs/format.md, "Planes") by multiplication, on any CPU.
//
// A product with codes is the sum over their planes of 2^place times the product with the plane. A vector
// register holds the same code of the 16 directions of a tile.

#pragma once

#include <type_traits>
#include <vector>

#include "cpu_vectors.h"

// `width` bits of each word from bit `shift` on.
template <int width> inline Floats codes(Words word, int shift) {
    const Ints wide = __builtin_convertvector(word, Ints) >> shift;
#ifdef __AVX512F__
    // A permutation looks at the low four bits of its index only, so that it masks and converts at once.
    constexpr int top = (1 << width) - 1;
    const Floats lookup = {0 & top, 1 & top, 2 & top,  3 & top,  4 & top,  5 & top,  6 & top,  7 & top,
                           8 & top, 9 & top, 10 & top, 11 & top, 12 & top, 13 & top, 14 & top, 15 & top};
    return __builtin_shuffle(lookup, wide);
#else
    return __builtin_convertvector(wide & ((1 << width) - 1), Floats);
#endif
}

// A word of each of a tile's n directions; the others get zero.
inline Words load_words(const uint16_t *from, int n) {
    Words word = {};
    if (n == TILE)
        std::memcpy(&word, from, sizeof word);
    else
        std::memcpy(&word, from, 2 * n);
    return word;
}

// A plane of the codes of one class. Its directions begin at column `start` of the tables and of t.
struct Plane {
    const uint16_t *words; // [tiles][blocks][8 * width][directions of the tile]
    int width, directions, start;
    float place;

    const uint16_t *tile(int number, int blocks) const { return words + int64_t(number) * TILE * blocks * 8 * width; }
};

// total[m][direction] += place * sum_k x[m][k] q[k][direction]. tile: [blocks][8 * width][n]; x: rows `stride` apart.
template <int width, int tokens>
void dot_plane(Floats *total, const uint16_t *tile, int n, int blocks, const float *x, int64_t stride, float place) {
    constexpr int words = 8 * width, per_word = 16 / width;
    constexpr int chains = tokens >= 4 ? 1 : 4 / tokens; // independent sums hide the latency of an addition
    Floats sums[tokens][chains] = {};
    for (int b = 0; b < blocks; b++)
        for (int j = 0; j < words; j++) {
            const Words word = load_words(tile + (int64_t(b) * words + j) * n, n);
            const float *at = x + int64_t(b) * BLOCK + j;
#pragma GCC unroll 16
            for (int p = 0; p < per_word; p++) {
                const Floats q = codes<width>(word, p * width);
#pragma GCC unroll 16
                for (int m = 0; m < tokens; m++)
                    sums[m][p % chains] += q * at[m * stride + p * words];
            }
        }
    for (int m = 0; m < tokens; m++)
        for (int c = 0; c < chains; c++)
            total[m] += place * sums[m][c];
}

// y[m][128] += sum over planes of this width and directions of place * t[m][direction] * q[direction][128], for
// block b.
template <int width, int tokens>
void combine(float *y, const std::vector<Plane> &planes, int blocks, int b, const float *t, int64_t stride) {
    constexpr int words = 8 * width, per_word = 16 / width;
    // 16 outputs at once: shifts of the same word, as many as there are, and neighbouring words.
    constexpr int shifts = std::min(per_word, TILE / tokens), neighbours = TILE / tokens / shifts;
    if (std::none_of(planes.begin(), planes.end(), [](const Plane &plane) { return plane.width == width; }))
        return;
    for (int j = 0; j < words; j += neighbours)
        for (int first = 0; first < per_word; first += shifts) {
            Floats sums[TILE] = {}; // [neighbours][shifts][tokens]
            for (const Plane &plane : planes) {
                if (plane.width != width)
                    continue;
                const auto add = [&](int tile, int n) __attribute__((always_inline)) {
                    const uint16_t *at = plane.tile(tile, blocks) + (int64_t(b) * words + j) * n;
                    // The place goes with whichever are fewer, t's entries or codes.
                    constexpr bool few = tokens <= 4;
                    const float *from = t + plane.start + tile * TILE;
                    Floats scaled[few ? tokens : 1];
                    if constexpr (few)
#pragma GCC unroll 4
                        for (int m = 0; m < tokens; m++)
                            scaled[m] = load(from + m * stride) * plane.place;
#pragma GCC unroll 4
                    for (int k = 0; k < neighbours; k++) {
                        const Words word = load_words(at + k * n, n);
#pragma GCC unroll 16
                        for (int p = 0; p < shifts; p++) {
                            Floats q = codes<width>(word, (first + p) * width);
                            if constexpr (!few)
                                q *= plane.place;
#pragma GCC unroll 16
                            for (int m = 0; m < tokens; m++)
                                sums[(k * shifts + p) * tokens + m] += q * (few ? scaled[m] : load(from + m * stride));
                        }
                    }
                };
                const int full = plane.directions / TILE, rest = plane.directions % TILE;
                for (int tile = 0; tile < full; tile++)
                    add(tile, TILE);
                if (rest)
                    add(full, rest);
            }
            const Floats totals = sum_each(sums);
            for (int k = 0; k < neighbours; k++)
                for (int p = 0; p < shifts; p++)
                    for (int m = 0; m < tokens; m++)
                        y[m * BLOCK + (first + p) * words + j + k] += totals[(k * shifts + p) * tokens + m];
        }
}

// Calls f with a plane's width as a constant.
template <class F> inline void with_width(int width, F f) {
    if (width == 4)
        f(std::integral_constant<int, 4>());
    else if (width == 2)
        f(std::integral_constant<int, 2>());
    else
        f(std::integral_constant<int, 1>());
}
