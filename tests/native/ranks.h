// Runs a function on several ranks, each a forked process, with a Store made of files in a temporary folder.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "comm/communicator.h"

namespace ranks {

using mlsys::comm::Communicator;
using mlsys::comm::Options;

struct Job {
  int size = 2;
  std::vector<int> locality = {};  // see Options::locality
  std::chrono::milliseconds timeout{60000};
  std::string job_key = "0123456789abcdef";
  std::vector<std::pair<std::string, std::string>> environment = {};
};

struct Rank {
  int rank;
  int size;
  std::shared_ptr<Communicator> comm;
  std::string folder;  // shared by the ranks of the job, for what tests tell each other
};

// How a rank ended: what it threw (empty when nothing), or its exit status or signal.
struct Outcome {
  int exit_code = 0;
  int signal = 0;
  std::string error;
};

std::shared_ptr<mlsys::comm::Store> file_store(const std::string& folder);

std::vector<Outcome> run_collecting(const Job& job, const std::function<void(Rank&)>& body);
// Fails the test with every failing rank's error.
void run(const Job& job, const std::function<void(Rank&)>& body);

// The topologies that every collective is tested on: all local, all remote, and mixtures.
std::vector<Job> topologies();
std::string describe(const Job& job);

// Writes / waits for a small file in the job's folder: how ranks meet in tests without the code under test.
void post(const Rank& rank, const std::string& name, const std::string& text);
std::string await_post(const Rank& rank, const std::string& name);
// Returns when every rank has called it: between an operation and a death, which would otherwise end the
// operation on ranks that are still in it.
void meet(const Rank& rank, const std::string& name);

}  // namespace ranks
