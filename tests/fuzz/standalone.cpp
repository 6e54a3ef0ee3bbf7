// SPDX-License-Identifier: Apache-2.0
// Driver for compilers without libFuzzer: seeded random inputs for the same entry point, with its
// options -runs=N and -seed=N.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

int main(int argc, char** argv) {
  long runs = 1000;
  unsigned long seed = 1;
  for (int i = 1; i < argc; ++i) {
    if (std::strncmp(argv[i], "-runs=", 6) == 0) runs = std::atol(argv[i] + 6);
    if (std::strncmp(argv[i], "-seed=", 6) == 0) seed = std::strtoul(argv[i] + 6, nullptr, 10);
  }
  std::mt19937_64 engine(seed);
  std::vector<std::uint8_t> input;
  for (long run = 0; run < runs; ++run) {
    input.resize(engine() % 4096);
    for (std::uint8_t& byte : input) byte = static_cast<std::uint8_t>(engine());
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("%ld inputs from seed %lu\n", runs, seed);
  return 0;
}
