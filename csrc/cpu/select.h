// Chooses among tables of kernels by instruction set.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace gqa::cpu {

// The first of `tables` (best first) that this processor supports, or the one that
// GQA_KERNELS_CPU_ISA names. Read at every call: tests change it.
template <class Table, int kCount>
const Table& select_kernels(const Table* const (&tables)[kCount]) {
  const char* forced = std::getenv("GQA_KERNELS_CPU_ISA");
  std::string names;
  for (const Table* table : tables) {
    if (!table->supported()) continue;
    if (forced == nullptr || *forced == '\0' || std::strcmp(forced, table->name) == 0)
      return *table;
    names += names.empty() ? table->name : std::string(", ") + table->name;
  }
  throw std::invalid_argument("GQA_KERNELS_CPU_ISA must be one of " + names + ", got " + forced);
}

}  // namespace gqa::cpu
