// Lets a library that a newer compiler has built run on the oldest systems where torch runs: glibc
// 2.28 and the libstdc++ of GCC 8. Compiled into each library; knows neither torch nor an op.
//
// Newer headers refer to three symbols that those systems lack. Each is defined here, so that the
// library needs none of them from outside. Linking libstdc++ and libgcc statically would not do:
// libgcc's unwinder of GCC 12 needs glibc 2.35, and our exceptions pass through torch's frames,
// which use the shared libstdc++.
#include <sstream>

#if defined(__linux__) && defined(__GLIBCXX__)

// glibc 2.32: whether std::shared_ptr may count without atomics. False is always right.
extern "C" {
extern __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
}

// libstdc++ of GCC 9 exports these constructors (GLIBCXX_3.4.26); older ones compile them in place.
template std::basic_stringstream<char>::basic_stringstream();
template std::basic_ostringstream<char>::basic_ostringstream();

#endif
