// SHA-256 (FIPS 180-4), small enough to read: the artifact's hash is checked before any of it is executed.

#ifndef MLFF_SHA256_H
#define MLFF_SHA256_H

#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>

namespace mlff {

class Sha256 {
 public:
  void update(std::string_view data)
  {
    length += data.size();
    for (const char byte : data) {
      block[filled++] = static_cast<std::uint8_t>(byte);
      if (filled == block.size()) compress();
    }
  }

  // hexadecimal; nothing can be added afterwards
  std::string digest()
  {
    const std::uint64_t bits = 8 * length;
    update(std::string_view("\x80", 1));
    while (filled != block.size() - 8) update(std::string_view("\0", 1));
    for (int shift = 56; shift >= 0; shift -= 8) {
      const char byte = static_cast<char>(bits >> shift);
      update(std::string_view(&byte, 1));
    }
    std::string text;
    for (const std::uint32_t word : state) {
      char hex[9];
      std::snprintf(hex, sizeof(hex), "%08x", static_cast<unsigned>(word));
      text += hex;
    }
    return text;
  }

 private:
  // Section 5.3.3 and 4.2.2: first 32 bits of the fractional parts of the roots of the first primes
  struct Constants {
    std::array<std::uint32_t, 8> start{};
    std::array<std::uint32_t, 64> k{};
    Constants()
    {
      const auto fraction = [](double root) { return static_cast<std::uint32_t>((root - std::floor(root)) * 0x1p32); };
      std::size_t found = 0;
      for (int n = 2; found < k.size(); n++) {
        bool prime = true;
        for (int d = 2; d * d <= n; d++) prime = prime && n % d != 0;
        if (!prime) continue;
        if (found < start.size()) start[found] = fraction(std::sqrt(n));
        k[found++] = fraction(std::cbrt(n));
      }
    }
  };

  static const Constants &constants()
  {
    static const Constants made;
    return made;
  }

  void compress()  // Section 6.2.2
  {
    std::array<std::uint32_t, 64> w;
    for (std::size_t t = 0; t < 16; t++)
      w[t] = std::uint32_t{block[4 * t]} << 24 | std::uint32_t{block[4 * t + 1]} << 16 |
          std::uint32_t{block[4 * t + 2]} << 8 | std::uint32_t{block[4 * t + 3]};
    for (std::size_t t = 16; t < 64; t++) {
      const auto s0 = std::rotr(w[t - 15], 7) ^ std::rotr(w[t - 15], 18) ^ (w[t - 15] >> 3);
      const auto s1 = std::rotr(w[t - 2], 17) ^ std::rotr(w[t - 2], 19) ^ (w[t - 2] >> 10);
      w[t] = s1 + w[t - 7] + s0 + w[t - 16];
    }
    auto [a, b, c, d, e, f, g, h] = state;
    for (std::size_t t = 0; t < 64; t++) {
      const auto sum1 = std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25);
      const auto t1 = h + sum1 + ((e & f) ^ (~e & g)) + constants().k[t] + w[t];
      const auto sum0 = std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22);
      const auto t2 = sum0 + ((a & b) ^ (a & c) ^ (b & c));
      h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    const std::array<std::uint32_t, 8> round{a, b, c, d, e, f, g, h};
    for (std::size_t i = 0; i < 8; i++) state[i] += round[i];
    filled = 0;
  }

  std::array<std::uint32_t, 8> state{constants().start};
  std::array<std::uint8_t, 64> block{};
  std::size_t filled = 0;
  std::uint64_t length = 0;
};

}    // namespace mlff

#endif
