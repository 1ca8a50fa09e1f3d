// A part of every wheel's library: what the compiler takes from libstdc++ and glibc that is newer
// than manylinux_2_28, defined here. gcc-toolset's libstdc++_nonshared.a does the same on the
// systems that manylinux wheels are usually built on.
#include <new>
#include <sstream>

#if defined(__GLIBCXX__)
// libstdc++ of GCC 9.
template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();

// libstdc++ of GCC 11.
namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
#endif

#if defined(__GLIBC__)
// glibc 2.32. False: count references atomically, as if there were other threads.
extern "C" {
char __libc_single_threaded = 0;
}
#endif
