// Which kind of store is chosen from operations of known speed.
#include "check.h"
#include "comm/local/store_choice.h"

namespace {

using mlsys::comm::StoreChoice;
using std::chrono::nanoseconds;

// Runs operations of ten tiles at these speeds (ns a tile); returns how many of them were streamed.
int run(StoreChoice& choice, int num_operations, int ordinary, int streaming) {
  int num_streamed = 0;
  for (int i = 0; i < num_operations; ++i) {
    num_streamed += choice.streaming();
    choice.record(10, nanoseconds(10 * (choice.streaming() ? streaming : ordinary)));
  }
  return num_streamed;
}

}  // namespace

TEST(the_faster_kind_of_store_is_used_but_for_a_few_trials) {
  StoreChoice ordinary_wins, streaming_wins;
  CHECK(run(ordinary_wins, 100, 50, 90) <= 7);
  CHECK(run(streaming_wins, 100, 90, 50) >= 90);
}

TEST(stores_change_when_the_other_kind_becomes_faster) {
  StoreChoice choice;
  run(choice, 50, 50, 90);
  run(choice, 50, 200, 90);  // the cores were moved apart
  CHECK(run(choice, 50, 200, 90) >= 45);
  run(choice, 50, 50, 90);
  CHECK(run(choice, 50, 50, 90) <= 5);
}

TEST(the_first_operation_and_a_single_slow_one_decide_nothing) {
  StoreChoice choice;
  choice.record(10, nanoseconds(1'000'000));  // page faults
  run(choice, 20, 50, 60);
  CHECK_EQUAL(run(choice, 4, 50, 60), 0);
  choice.record(10, nanoseconds(650));  // one operation of 65 ns a tile among those of 50
  CHECK_EQUAL(run(choice, 4, 50, 60), 0);
}
