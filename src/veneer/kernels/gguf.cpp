// The blocks of a GGUF file as numbers, row by row, in one pass over memory.
//
// Each format below is ggml's own (block_q4_K and so on in ggml-common.h), and its values are those of
// gguf-py to the bit: what is added to a product is added to one that float32 holds exactly, so that it
// does not matter whether the compiler fuses the two. quant/gguf_formulas.py has the same in torch.

#include <cstring>

#include "numbers.h"

namespace {

// Sixteen numbers at a time, written out: compilers make no vectors of loops as short as these.
using Byte = std::uint8_t;
using Bytes __attribute__((vector_size(16))) = Byte;
using Ints __attribute__((vector_size(64))) = std::int32_t;
using Words __attribute__((vector_size(64))) = std::uint32_t;
using Shorts __attribute__((vector_size(32))) = std::uint16_t;
using Floats __attribute__((vector_size(64))) = float;

constexpr Ints kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline Ints ints(const Byte* bytes) {
    Bytes x;
    std::memcpy(&x, bytes, sizeof x);
    return __builtin_convertvector(x, Ints);
}

// Bytes with a sign; to convert them as such would be slower.
inline Ints signed_ints(const Byte* bytes) { return (ints(bytes) ^ 128) - 128; }

// Numbers as bfloat16 (rounded as by `store`), float32 or float64.
template <class T>
inline void write(Floats x, T* y) {
    if constexpr (std::is_same_v<T, BFloat16>) {
        Words bits;
        std::memcpy(&bits, &x, sizeof bits);
        const Words even = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
        bits = x != x ? Words{} + 0x7fc0u : even;
        const Shorts upper = __builtin_convertvector(bits, Shorts);
        std::memcpy(y, &upper, sizeof upper);
    } else {
        for (int i = 0; i < 16; ++i) y[i] = x[i];
    }
}

// y = d · code, and y = d · code + m: adding a minimum of 0 would lose the sign of −0.
template <class T>
inline void write(Ints codes, float d, T* y) {
    write(__builtin_convertvector(codes, Floats) * d, y);
}
template <class T>
inline void write(Ints codes, float d, float m, T* y) {
    write(__builtin_convertvector(codes, Floats) * d + m, y);
}

// float16 to float32, without denormal numbers on the way: torch may have them flushed to zero.
inline float half(const Byte* bytes) {
    std::uint16_t h;
    std::memcpy(&h, bytes, 2);
    const std::uint32_t sign = std::uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, rest = h & 1023;
    if (exponent == 0) {
        const float small = float(rest) * 0x1p-24f;
        return sign ? -small : small;
    }
    const std::uint32_t wide = exponent == 31 ? 255 : exponent + 112;
    return std::bit_cast<float>(sign | wide << 23 | rest << 13);
}

// The codes of 32 numbers in 16 bytes, those of the first 16 in their low halves; of 5 bits, the
// highest are in 4 bytes more.
struct Halves {
    Ints first, second;
    explicit Halves(const Byte* q) : first(ints(q) & 15), second(ints(q) >> 4) {}
    Halves(const Byte* q, const Byte* highest) : Halves(q) {
        first |= ((Ints{} + (highest[0] | highest[1] << 8)) >> kLane & 1) << 4;
        second |= ((Ints{} + (highest[2] | highest[3] << 8)) >> kLane & 1) << 4;
    }
    template <class T>
    void write_from(int offset, float d, T* y) const {
        write(first - offset, d, y);
        write(second - offset, d, y + 16);
    }
    template <class T>
    void write_above(float m, float d, T* y) const {
        write(first, d, m, y);
        write(second, d, m, y + 16);
    }
};

struct Q4_0 {  // d, 32 codes
    static constexpr Size kNumbers = 32, kBytes = 18;
    template <class T>
    static void unpack(const Byte* b, T* y) {
        Halves(b + 2).write_from(8, half(b), y);
    }
};

struct Q4_1 {  // d, m, 32 codes
    static constexpr Size kNumbers = 32, kBytes = 20;
    template <class T>
    static void unpack(const Byte* b, T* y) {
        Halves(b + 4).write_above(half(b + 2), half(b), y);
    }
};

struct Q5_0 {  // d, the highest bits, the rest of 32 codes
    static constexpr Size kNumbers = 32, kBytes = 22;
    template <class T>
    static void unpack(const Byte* b, T* y) {
        Halves(b + 6, b + 2).write_from(16, half(b), y);
    }
};

struct Q5_1 {  // d, m, the highest bits, the rest of 32 codes
    static constexpr Size kNumbers = 32, kBytes = 24;
    template <class T>
    static void unpack(const Byte* b, T* y) {
        Halves(b + 8, b + 4).write_above(half(b + 2), half(b), y);
    }
};

struct Q8_0 {  // d, 32 codes with a sign
    static constexpr Size kNumbers = 32, kBytes = 34;
    template <class T>
    static void unpack(const Byte* b, T* y) {
        const float d = half(b);
#pragma omp simd
        for (int i = 0; i < 32; ++i) y[i] = store<T>(d * float(std::int8_t(b[2 + i])));
    }
};

// The scale and the minimum, 6 bits each, of the eight groups in a block of Q4_K or Q5_K.
struct Groups {
    float scales[8], minima[8];
    Groups(const Byte* b) {
        const float d = half(b), least = half(b + 2);
        const Byte* s = b + 4;
        for (int i = 0; i < 4; ++i) {
            scales[i] = d * float(s[i] & 63);
            minima[i] = least * float(s[i + 4] & 63);
            scales[i + 4] = d * float((s[i + 8] & 15) | s[i] >> 6 << 4);
            minima[i + 4] = least * float(s[i + 8] >> 4 | s[i + 4] >> 6 << 4);
        }
    }
};

struct Q4_K {  // d, the minima's d, 8 scales and minima, 256 codes
    static constexpr Size kNumbers = 256, kBytes = 144;
    template <class T>
    static void unpack(const Byte* b, T* y) {
        const Groups of(b);
        for (int group = 0; group < 8; group += 2, y += 64) {
            for (int i = 0; i < 32; i += 16) {
                const Ints both = ints(b + 16 + 16 * group + i);
                write(both & 15, of.scales[group], -of.minima[group], y + i);
                write(both >> 4, of.scales[group + 1], -of.minima[group + 1], y + 32 + i);
            }
        }
    }
};

struct Q5_K {  // d, the minima's d, 8 scales and minima, the highest bits, the rest of 256 codes
    static constexpr Size kNumbers = 256, kBytes = 176;
    template <class T>
    static void unpack(const Byte* b, T* y) {
        const Groups of(b);
        const Ints highest[2] = {ints(b + 16), ints(b + 32)};
        for (int group = 0; group < 8; group += 2, y += 64) {
            for (int i = 0; i < 32; i += 16) {
                const Ints both = ints(b + 48 + 16 * group + i), bits = highest[i / 16] >> group;
                const Ints first = (both & 15) | (bits & 1) << 4, second = both >> 4 | (bits >> 1 & 1) << 4;
                write(first, of.scales[group], -of.minima[group], y + i);
                write(second, of.scales[group + 1], -of.minima[group + 1], y + 32 + i);
            }
        }
    }
};

struct Q6_K {  // the low 4 bits, the high 2 bits, 16 scales with a sign, d
    static constexpr Size kNumbers = 256, kBytes = 210;
    template <class T>
    static void unpack(const Byte* b, T* y) {
        const float d = half(b + 208);
        const auto* scales = reinterpret_cast<const std::int8_t*>(b + 192);
        for (int part = 0; part < 2; ++part, b += 64, scales += 8, y += 128) {
            for (int i = 0; i < 2; ++i) {
                const Byte* two_bits = b + 128 - 32 * part + 16 * i;
                const Ints first = ints(b + 16 * i), second = ints(b + 32 + 16 * i), high = ints(two_bits);
                const Ints codes[4] = {
                    (first & 15) | (high & 3) << 4,
                    (second & 15) | (high >> 2 & 3) << 4,
                    first >> 4 | (high >> 4 & 3) << 4,
                    second >> 4 | (high >> 6 & 3) << 4,
                };
                for (int k = 0; k < 4; ++k)
                    write(codes[k] - 32, d * float(scales[2 * k + i]), y + 32 * k + 16 * i);
            }
        }
    }
};

struct Q2_K {  // 16 scales and minima of 4 bits each, 256 codes, d, the minima's d
    static constexpr Size kNumbers = 256, kBytes = 84;
    template <class T>
    static void unpack(const Byte* b, T* y) {
        const float d = half(b + 80), least = half(b + 82);
        for (int part = 0; part < 2; ++part) {
            for (int i = 0; i < 2; ++i) {
                const Ints four = ints(b + 16 + 32 * part + 16 * i);
                for (int k = 0; k < 4; ++k) {
                    const int group = 8 * part + 2 * k + i;
                    const float scale = d * float(b[group] & 15), m = least * float(b[group] >> 4);
                    write(four >> (2 * k) & 3, scale, -m, y + 16 * group);
                }
            }
        }
    }
};

struct Q3_K {  // the highest bits, the low 2 bits, 16 scales of 6 bits, d
    static constexpr Size kNumbers = 256, kBytes = 110;
    template <class T>
    static void unpack(const Byte* b, T* y) {
        const Byte* s = b + 96;
        const float d = half(b + 108);
        const Ints highest[2] = {ints(b), ints(b + 16)};
        for (int part = 0; part < 2; ++part) {
            for (int i = 0; i < 2; ++i) {
                const Ints four = ints(b + 32 + 32 * part + 16 * i);
                for (int k = 0; k < 4; ++k) {
                    const int group = 8 * part + 2 * k + i;
                    const int low = part ? s[group - 8] >> 4 : s[group] & 15;
                    const int code = low | (s[8 + group % 4] >> (2 * (group / 4)) & 3) << 4;
                    const Ints bit = highest[i] >> (group / 2) & 1;
                    write((four >> (2 * k) & 3) + 4 * bit - 4, d * float(code - 32), y + 16 * group);
                }
            }
        }
    }
};

constexpr Bytes kIQ4 = {129, 152, 173, 191, 207, 221, 234, 246, 1, 13, 25, 38, 53, 69, 89, 113};

// The values of the 32 codes in 16 bytes, which lie denser near zero: −127, −104, ... 89, 113.
template <class T>
inline void write_values(const Byte* q, float d, T* y) {
    Bytes both;
    std::memcpy(&both, q, sizeof both);
    for (int part = 0; part < 2; ++part, y += 16) {
        const Bytes codes = part ? both >> 4 : both & 15;
        Bytes values;
#ifdef __clang__
        for (int i = 0; i < 16; ++i) values[i] = kIQ4[codes[i]];
#else
        values = __builtin_shuffle(kIQ4, codes);
#endif
        write(signed_ints(reinterpret_cast<const Byte*>(&values)), d, y);
    }
}

struct IQ4_NL {  // d, 32 codes
    static constexpr Size kNumbers = 32, kBytes = 18;
    template <class T>
    static void unpack(const Byte* b, T* y) {
        write_values(b + 2, half(b), y);
    }
};

struct IQ4_XS {  // d, the high 2 and the low 4 bits of 8 scales, 256 codes
    static constexpr Size kNumbers = 256, kBytes = 136;
    template <class T>
    static void unpack(const Byte* b, T* y) {
        const float d = half(b);
        const int high = b[2] | b[3] << 8;
        for (int group = 0; group < 8; ++group) {
            const int low = b[4 + group / 2] >> (group % 2 * 4) & 15;
            const int scale = (low | (high >> (2 * group) & 3) << 4) - 32;
            write_values(b + 8 + 16 * group, d * float(scale), y + 32 * group);
        }
    }
};

// Row i of y is row order[i] of the blocks, or row i without an order.
template <class Format, class T>
void dequantize(const Byte* blocks, const Size* order, T* y, Size rows, Size cols) {
    const Size count = cols / Format::kNumbers, width = count * Format::kBytes;
#pragma omp parallel for schedule(static) if (rows * cols > kWorthSharing)
    for (Size row = 0; row < rows; ++row) {
        const Byte* b = blocks + (order ? order[row] : row) * width;
        T* z = y + row * cols;
        for (Size i = 0; i < count; ++i)
            Format::template unpack<T>(b + i * Format::kBytes, z + i * Format::kNumbers);
    }
}

}  // namespace

#define EXPORTED_FORMAT(Format, name, T)                                                           \
    extern "C" void Format##_##name(const Byte* blocks, const Size* order, T* y, Size rows,        \
                                    Size cols) {                                                   \
        dequantize<Format>(blocks, order, y, rows, cols);                                          \
    }
#define EXPORTED(name, T)                                                                          \
    EXPORTED_FORMAT(Q4_0, name, T)                                                                 \
    EXPORTED_FORMAT(Q4_1, name, T)                                                                 \
    EXPORTED_FORMAT(Q5_0, name, T)                                                                 \
    EXPORTED_FORMAT(Q5_1, name, T)                                                                 \
    EXPORTED_FORMAT(Q8_0, name, T)                                                                 \
    EXPORTED_FORMAT(Q2_K, name, T)                                                                 \
    EXPORTED_FORMAT(Q3_K, name, T)                                                                 \
    EXPORTED_FORMAT(Q4_K, name, T)                                                                 \
    EXPORTED_FORMAT(Q5_K, name, T)                                                                 \
    EXPORTED_FORMAT(Q6_K, name, T)                                                                 \
    EXPORTED_FORMAT(IQ4_NL, name, T)                                                               \
    EXPORTED_FORMAT(IQ4_XS, name, T)

FOR_EACH_DTYPE(EXPORTED)
