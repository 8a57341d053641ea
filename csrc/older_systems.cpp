// What newer headers ask of newer libraries, for a build that is to load beside older ones; seen by this library alone.
#include <new>
#include <sstream>

// The constructors without arguments are symbols since GCC 9; before, they were compiled where they were called.
template std::basic_stringstream<char>::basic_stringstream();
template std::basic_ostringstream<char>::basic_ostringstream();

__asm__(".hidden __libc_single_threaded\n.hidden _ZSt28__throw_bad_array_new_lengthv");

// Never: reference counts are atomic whether or not there are threads.
extern "C" {
extern char __libc_single_threaded;
char __libc_single_threaded = 0;
}

namespace std {
[[noreturn]] void __throw_bad_array_new_length();
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
