// A tiny check library: TEST(name) { CHECK(...); } and a main that runs all tests, or those whose name
// contains an argument.
#pragma once

#include <cstdio>
#include <cstring>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*run)();
};
inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
struct Registration {
  Registration(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class L, class R>
std::string shown(const L& left, const R& right) {
  std::ostringstream text;
  text << " (" << left << " and " << right << ")";
  return text.str();
}

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  throw Failure(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

inline int run_all(int argc, char** argv) {
  int num_failed = 0, num_run = 0;
  for (const Test& test : tests()) {
    bool wanted = argc < 2;
    for (int i = 1; i < argc; ++i) wanted |= std::strstr(test.name, argv[i]) != nullptr;
    if (!wanted) continue;
    ++num_run;
    try {
      test.run();
    } catch (const std::exception& error) {
      ++num_failed;
      std::fprintf(stderr, "FAILED %s\n  %s\n", test.name, error.what());
    }
  }
  std::printf("%d of %d tests passed\n", num_run - num_failed, num_run);
  return num_failed == 0 && num_run > 0 ? 0 : 1;
}

}  // namespace check

#define TEST(name)                                                   \
  static void name();                                                \
  static const check::Registration registration_##name(#name, name); \
  static void name()
#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) check::fail(__FILE__, __LINE__, "not true: " #condition); \
  } while (false)
#define CHECK_EQUAL(left, right)                                                               \
  do {                                                                                         \
    const auto left_value = (left);                                                            \
    const auto right_value = (right);                                                          \
    if (!(left_value == right_value)) {                                                        \
      check::fail(__FILE__, __LINE__,                                                          \
                  "not equal: " #left " and " #right + check::shown(left_value, right_value)); \
    }                                                                                          \
  } while (false)
#define CHECK_THROWS(Type, expression, text)                                                       \
  do {                                                                                             \
    std::string caught = "nothing";                                                                \
    try {                                                                                          \
      expression;                                                                                  \
    } catch (const Type& error) {                                                                  \
      caught = std::string(": ") + error.what();                                                   \
      if (caught.find(text) == std::string::npos) {                                                \
        check::fail(__FILE__, __LINE__, "message without \"" + std::string(text) + "\"" + caught); \
      }                                                                                            \
      break;                                                                                       \
    }                                                                                              \
    check::fail(__FILE__, __LINE__, #expression " did not throw " #Type);                          \
  } while (false)
