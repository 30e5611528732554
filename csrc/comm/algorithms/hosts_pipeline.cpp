#include "comm/algorithms/hosts_pipeline.h"

namespace mlsys::comm {
namespace {

// Signals in shared memory do not end a sleep on sockets; while both may come, sleeps are short.
constexpr int kShortSleepMs = 1;
constexpr int kLongSleepMs = 200;

class Pipeline {
 public:
  Pipeline(Context& context, TileStages& stages, Wire& wire, size_t num_tiles)
      : team_(context.team), mesh_(*context.mesh), stages_(stages), wire_(wire), num_tiles_(num_tiles) {}

  void run() {
    while (collected_ < num_tiles_) {
      const bool moved = work_in_memory() | wire_.progress();
      if (moved) {
        mesh_.progress();
      } else {
        wait();
      }
    }
  }

 private:
  // One tile at each stage, so that the wire is looked after in between.
  bool work_in_memory() {
    const size_t before = published_ + loaded_ + finished_ + collected_;
    if (published_ < num_tiles_ && published_ < collected_ + kTileSlots) {
      stages_.publish(published_++);
      team_.signal(LocalTeam::kFirst);
    }
    if (loaded_ < published_ && has(LocalTeam::kFirst, loaded_)) {
      stages_.load(loaded_++);
      wire_.set_loaded(loaded_);
    }
    if (finished_ < wire_.num_done()) {
      stages_.finish(finished_++);
      team_.signal(LocalTeam::kSecond);
    }
    if (collected_ < finished_ && has(LocalTeam::kSecond, collected_)) stages_.collect(collected_++);
    return published_ + loaded_ + finished_ + collected_ != before;
  }

  bool has(LocalTeam::Counter counter, size_t tile) const {
    return team_.all_signalled(counter, static_cast<uint32_t>(tile + 1));
  }

  void wait() {
    // Everyone has arrived, so the first tile is about to be published: no reason to look at the wire.
    const bool for_load = loaded_ < published_, for_collect = collected_ < finished_;
    if (for_load && (loaded_ == 0 || mesh_.all_done())) {
      team_.await_all(LocalTeam::kFirst, static_cast<uint32_t>(loaded_ + 1));
    } else if (mesh_.all_done()) {
      team_.await_all(LocalTeam::kSecond, static_cast<uint32_t>(collected_ + 1));
    } else {
      mesh_.step(for_load || for_collect ? kShortSleepMs : kLongSleepMs);
    }
  }

  LocalTeam& team_;
  Mesh& mesh_;
  TileStages& stages_;
  Wire& wire_;
  size_t num_tiles_;
  size_t published_ = 0, loaded_ = 0, finished_ = 0, collected_ = 0;
};

}  // namespace

void run_pipeline(Context& context, TileStages& stages, Wire& wire, size_t num_tiles) {
  Pipeline(context, stages, wire, num_tiles).run();
}

}  // namespace mlsys::comm
