// Vectors of 16 numbers (GCC's vector types: no intrinsics), and the number types of activations.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

constexpr int TILE = 16, BLOCK = 128;

using Floats = float __attribute__((vector_size(4 * TILE)));
using Ints = int32_t __attribute__((vector_size(4 * TILE)));
using Words = uint16_t __attribute__((vector_size(2 * TILE)));

inline Floats load(const float *from) {
    Floats value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline void store(float *to, Floats value) { std::memcpy(to, &value, sizeof value); }

// [i] = the sum of the 16 entries of v[i]: vectors are added in pairs, half of each, until one is left.
inline Floats sum_each(Floats *v) {
    constexpr Ints even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    for (int half = TILE / 2; half; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++)
            v[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], even) + __builtin_shuffle(v[2 * i], v[2 * i + 1], even + 1);
    return *v;
}

inline float sum(Floats v) {
    for (int half = TILE / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            v[i] += v[i + half];
    return v[0];
}

inline Ints bits_of(Floats value) {
    Ints bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline Floats floats_of(Ints bits) {
    Floats value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Each type of activations: how 16 of them become floats, and floats, none of them above MAX, become them. All
// round to the nearest, ties to even. The conversions are spelled out: not every compiler knows these types.

struct Float32 {
    using Stored = Floats;
    using Element = float;
    static constexpr float MAX = 0x1.fffffep127f;
    static Floats widen(Stored from) { return from; }
    static Stored narrow(Floats from) { return from; }
};

struct BFloat16 {
    using Stored = Words;
    using Element = uint16_t;
    static constexpr float MAX = 0x1.fep127f;
    static Floats widen(Stored from) { return floats_of(__builtin_convertvector(from, Ints) << 16); }
    static Stored narrow(Floats from) {
        const Ints bits = bits_of(from);
        return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Words);
    }
};

struct Float16 {
    using Stored = Words;
    using Element = uint16_t;
    static constexpr float MAX = 65504;
    static Floats widen(Stored from) {
        const Ints half = __builtin_convertvector(from, Ints), rest = half & 0x7fff;
        const Ints normal = (rest << 13) + (112 << 23); // the exponents' biases differ by 112
        const Ints special = (rest << 13) | 0x7f800000;
        const Ints small = bits_of(__builtin_convertvector(rest, Floats) * 0x1p-24f);
        return floats_of((rest >= 0x7c00 ? special : rest < 0x400 ? small : normal) | (half & 0x8000) << 16);
    }
    static Stored narrow(Floats from) {
        const Ints bits = bits_of(from), rest = bits & 0x7fffffff;
        const Ints normal = (rest - (112 << 23) + 0xfff + ((rest >> 13) & 1)) >> 13;
        const Ints small = bits_of(floats_of(rest) + 0.5f) - 0x3f000000; // adding 1/2 rounds to steps of 2^-24
        return __builtin_convertvector((rest < 0x38800000 ? small : normal) | ((bits >> 16) & 0x8000), Words);
    }
};

// The first n of up to 16 numbers as floats; the others are zero.
template <class Type> inline Floats load_as(const typename Type::Element *from, int n) {
    typename Type::Stored value = {};
    if (n == TILE)
        std::memcpy(&value, from, sizeof value);
    else
        std::memcpy(&value, from, n * sizeof *from);
    return Type::widen(value);
}

// NaN is stored as 0 and overflow as the largest number: see _finite in vllm_prinmix/cpu_backend.py.
template <class Type> inline void store_as(typename Type::Element *to, Floats value, int n) {
    value = value == value ? value : Floats{};
    value = value < Type::MAX ? value : Floats{} + Type::MAX;
    value = value > -Type::MAX ? value : Floats{} - Type::MAX;
    const typename Type::Stored stored = Type::narrow(value);
    if (n == TILE)
        std::memcpy(to, &stored, sizeof stored);
    else
        std::memcpy(to, &stored, n * sizeof *to);
}

// Calls f with the type of a number in native.py's DTYPES.
template <class F> inline void with_type(int number, F f) {
    if (number == 0)
        f(Float32());
    else if (number == 1)
        f(BFloat16());
    else
        f(Float16());
}
