// Makes calls that tests/support/recorded_kernels.py has written down, of libraries for this processor,
// and compares what they write with what was written there; and multiplies as a serving step does, beside
// a sum in double. Without torch or Python, so that an emulator runs it in seconds.
//
//     replay_kernels CALLS LIBRARIES LEVEL     as in LIBRARIES/native-neon.so

#include <dlfcn.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <vector>

using Size = std::int64_t;

enum Kind : Size { kNull, kWhole, kReal, kAddress };
enum Dtype : Size { kExact, kBFloat16, kFloat32, kFloat64 };

struct Block {
    Size dtype;
    std::vector<char> memory, before, expected;
    std::set<Size> addresses;  // places that hold them: other here than there
};

static FILE* file;

static bool read(void* to, Size bytes) { return std::fread(to, 1, std::size_t(bytes), file) == std::size_t(bytes); }
template <class T>
static T next() {
    T value;
    if (!read(&value, sizeof value)) std::exit((std::fprintf(stderr, "the calls end too soon\n"), 2));
    return value;
}

static double number(const char* at, Size dtype) {
    if (dtype == kFloat64) return *reinterpret_cast<const double*>(at);
    if (dtype == kFloat32) return *reinterpret_cast<const float*>(at);
    std::uint32_t bits = std::uint32_t(*reinterpret_cast<const std::uint16_t*>(at)) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// The largest difference, in units of what the tests of the kernels allow (tests/kernels/test_kernels.py):
// of a number's own size and of the block's mean.
static double difference(const Block& block) {
    if (block.dtype == kExact) {
        for (Size i = 0; i < Size(block.memory.size()); ++i)
            if (block.memory[i] != block.expected[i] && !block.addresses.count(i / 8 * 8)) return INFINITY;
        return 0;
    }
    const Size width = block.dtype == kBFloat16 ? 2 : block.dtype == kFloat32 ? 4 : 8;
    const double allowed = block.dtype == kBFloat16 ? 2e-2 : block.dtype == kFloat32 ? 2e-6 : 1e-13;
    const Size count = Size(block.memory.size()) / width;
    double sum = 0, worst = 0;
    Size finite = 0;
    for (Size i = 0; i < count; ++i) {
        const double b = number(&block.expected[i * width], block.dtype);
        const bool written = std::memcmp(&block.before[i * width], &block.expected[i * width], std::size_t(width));
        if (written && std::isfinite(b)) sum += std::fabs(b), ++finite;
    }
    const double mean = finite ? sum / finite : 0;
    for (Size i = 0; i < count; ++i) {
        const double a = number(&block.memory[i * width], block.dtype);
        const double b = number(&block.expected[i * width], block.dtype);
        if (a == b || (std::isnan(a) && std::isnan(b))) continue;
        const double off = std::fabs(a - b) / (allowed * (std::fabs(b) + mean));
        if (!(off <= worst)) worst = std::isnan(off) ? INFINITY : off;
    }
    return worst;
}

// Calls a function of any arguments: whole numbers and addresses go in registers of their own and then on
// the stack in order, and at most 8 reals in theirs, on x86-64 (System V) as on arm64. So all functions
// can be called as one that takes many of both.
static void call(void* function, const std::vector<Size>& n, const std::vector<double>& r) {
    using Many = void (*)(Size, Size, Size, Size, Size, Size, Size, Size, Size, Size, Size, Size, Size, Size, Size,
                          Size, Size, Size, Size, Size, Size, Size, Size, Size, Size, Size, Size, Size, Size, Size,
                          Size, Size, double, double, double, double, double, double, double, double);
    reinterpret_cast<Many>(function)(n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12],
                                     n[13], n[14], n[15], n[16], n[17], n[18], n[19], n[20], n[21], n[22], n[23],
                                     n[24], n[25], n[26], n[27], n[28], n[29], n[30], n[31], r[0], r[1], r[2], r[3],
                                     r[4], r[5], r[6], r[7]);
}

static void* library(const std::string& directory, const std::string& name, const std::string& level) {
    const std::string path = directory + "/" + name + "-" + level + ".so";
    void* handle = dlopen(path.c_str(), RTLD_NOW);
    if (!handle) std::exit((std::fprintf(stderr, "%s\n", dlerror()), 2));
    return handle;
}

struct Linear {  // of decode.h
    const void *weight, *bias, *scales, *values;
    Size out, in, kind;
};

// W x + b by decode.cpp for one token and many, in units of float32's rounding of the sum of magnitudes.
static double worst_product(void* decode) {
    using Product = void (*)(const float*, const Linear*, float*, Size, Size);
    const auto product = reinterpret_cast<Product>(dlsym(decode, "product_float32"));
    double worst = 0;
    std::uint32_t state = 1;
    const auto draw = [&] { return float(Size(state = state * 1664525u + 1013904223u) - (Size(1) << 31)) / 2147483648.f; };
    for (Size tokens : {1, 2, 3, 4, 5, 9})
        for (Size in : {1, 15, 16, 64, 100})
            for (Size out : {1, 31, 32, 70}) {
                std::vector<float> x(tokens * in), w(out * in), b(out), y(tokens * out);
                for (auto* numbers : {&x, &w, &b})
                    for (float& value : *numbers) value = draw();
                const Linear linear{w.data(), b.data(), nullptr, nullptr, out, in, 0};
                product(x.data(), &linear, y.data(), tokens, 2);
                for (Size t = 0; t < tokens; ++t)
                    for (Size o = 0; o < out; ++o) {
                        double sum = b[o], size = std::fabs(b[o]);
                        for (Size i = 0; i < in; ++i) {
                            const double term = double(x[t * in + i]) * w[o * in + i];
                            sum += term, size += std::fabs(term);
                        }
                        const double off = std::fabs(y[t * out + o] - sum) / (2e-6 * size);
                        worst = off > worst || std::isnan(off) ? off : worst;
                    }
            }
    return worst;
}

int main(int count, char** values) {
    if (count != 4 || !(file = std::fopen(values[1], "rb"))) return std::fprintf(stderr, "usage: replay_kernels CALLS LIBRARIES LEVEL\n"), 2;
    std::map<std::string, std::pair<Size, double>> results;
    Size head;
    while (read(&head, 8)) {
        std::string names(std::size_t(head), ' ');
        if (!read(names.data(), head)) return 2;
        const std::string name = names.c_str(), symbol = names.c_str() + name.size() + 1;
        struct Argument { Size kind, value, offset; };
        std::vector<Argument> arguments(std::size_t(next<Size>()));
        for (auto& argument : arguments) argument = next<Argument>();
        std::vector<Block> blocks(std::size_t(next<Size>()));
        std::vector<std::vector<Argument>> fixes;  // addresses: their place, block and offset
        for (auto& block : blocks) {
            block.dtype = next<Size>();
            const auto bytes = std::size_t(next<Size>());
            fixes.emplace_back(std::size_t(next<Size>()));
            block.memory.resize(bytes), block.expected.resize(bytes);
            if (!read(block.memory.data(), Size(bytes)) || !read(block.expected.data(), Size(bytes))) return 2;
            for (auto& fix : fixes.back()) fix = next<Argument>();
        }
        for (auto& block : blocks) block.before = block.memory;
        for (std::size_t i = 0; i < blocks.size(); ++i)
            for (const auto& fix : fixes[i]) {
                const char* address = blocks[std::size_t(fix.value)].memory.data() + fix.offset;
                std::memcpy(blocks[i].memory.data() + fix.kind, &address, sizeof address);
                blocks[i].addresses.insert(fix.kind);
            }
        std::vector<Size> whole;
        std::vector<double> real;
        for (const auto& argument : arguments) {
            double value;
            std::memcpy(&value, &argument.value, sizeof value);
            if (argument.kind == kReal) real.push_back(value);
            else if (argument.kind == kAddress)
                whole.push_back(Size(blocks[std::size_t(argument.value)].memory.data() + argument.offset));
            else whole.push_back(argument.kind == kWhole ? argument.value : 0);
        }
        if (whole.size() > 32 || real.size() > 8) return std::fprintf(stderr, "%s takes too much\n", symbol.c_str()), 2;
        whole.resize(32), real.resize(8);
        void* function = dlsym(library(values[2], name, values[3]), symbol.c_str());
        if (!function) return std::fprintf(stderr, "no %s\n", symbol.c_str()), 2;
        call(function, whole, real);
        auto& [calls, worst] = results[name + " " + symbol];
        ++calls;
        for (const auto& block : blocks) worst = std::max(worst, difference(block));
    }
    results["decode product_float32"] = {120, worst_product(library(values[2], "decode", values[3]))};
    bool right = results.size() > 1;
    for (const auto& [name, result] : results) {
        std::printf("%-48s %3lld calls, off by %.2g of what is allowed\n", name.c_str(), (long long)result.first, result.second);
        right &= result.second <= 1;
    }
    std::printf("%s: %zu functions\n", right ? "all agree" : "NOT all agree", results.size());
    return right ? 0 : 1;
}
