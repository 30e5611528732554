#include "ranks.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <thread>

#include "check.h"

namespace ranks {
namespace {

namespace fs = std::filesystem;

std::string file_name(const std::string& key) {
  std::string name = key;
  for (char& c : name) {
    if (c == '/') c = '_';
  }
  return name;
}

void write_atomically(const std::string& path, const char* data, size_t bytes) {
  const std::string draft = path + ".draft" + std::to_string(::getpid());
  std::ofstream(draft, std::ios::binary).write(data, static_cast<std::streamsize>(bytes));
  fs::rename(draft, path);
}

std::vector<uint8_t> await_file(const std::string& path, std::chrono::milliseconds timeout) {
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  while (!fs::exists(path)) {
    if (std::chrono::steady_clock::now() >= deadline)
      throw mlsys::comm::TimedOut("timed out waiting for " + path);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

class FileStore final : public mlsys::comm::Store {
 public:
  explicit FileStore(std::string folder) : folder_(std::move(folder)) {}
  void set(const std::string& key, const std::vector<uint8_t>& value) override {
    write_atomically(folder_ + "/" + file_name(key), reinterpret_cast<const char*>(value.data()),
                     value.size());
  }
  std::vector<uint8_t> get(const std::string& key, std::chrono::milliseconds timeout) override {
    return await_file(folder_ + "/" + file_name(key), timeout);
  }

 private:
  std::string folder_;
};

[[noreturn]] void be_rank(const Job& job, int number, const std::string& folder, int error_pipe,
                          const std::function<void(Rank&)>& body) {
  int code = 0;
  try {
    for (const auto& [name, value] : job.environment) ::setenv(name.c_str(), value.c_str(), 1);
    Options options;
    options.rank = number;
    options.size = job.size;
    options.group_name = "test";
    for (int rank = 0; rank < job.size; ++rank) options.global_ranks.push_back(rank);
    options.timeout = job.timeout;
    options.locality = job.locality;
    options.job_key = job.job_key;
    Rank rank{number, job.size, Communicator::create(file_store(folder), options), folder};
    body(rank);
    rank.comm.reset();
  } catch (const std::exception& error) {
    const std::string text = error.what();
    if (::write(error_pipe, text.data(), text.size()) < 0) std::perror("write");
    code = 1;
  }
  std::fflush(nullptr);
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
  std::exit(code);  // lets the sanitizer report
#else
  ::_exit(code);
#endif
}

// From /proc: 'T' is stopped, 'Z' has ended.
char state_of(pid_t pid) {
  std::ifstream stat("/proc/" + std::to_string(pid) + "/stat");
  std::string line;
  std::getline(stat, line);
  const size_t name_ends = line.rfind(") ");
  return name_ends == std::string::npos ? 'Z' : line[name_ends + 2];
}

// Whoever was to continue a stopped rank may have failed before: when all the others have ended, nobody will.
void await_news(int pipe, const std::vector<std::pair<pid_t, int>>& children) {
  pollfd waiting{pipe, POLLIN, 0};
  while (::poll(&waiting, 1, 200) == 0) {
    std::string states;
    for (const auto& [pid, unused] : children) states += state_of(pid);
    if (states.find_first_not_of("TZ") != std::string::npos) continue;
    for (size_t rank = 0; rank < children.size(); ++rank) {
      if (states[rank] == 'T') ::kill(children[rank].first, SIGKILL);
    }
  }
}

Outcome outcome_of(pid_t pid, int error_pipe, const std::vector<std::pair<pid_t, int>>& children) {
  Outcome outcome;
  char buffer[4096];
  await_news(error_pipe, children);
  for (ssize_t got; (got = ::read(error_pipe, buffer, sizeof(buffer))) > 0;)
    outcome.error.append(buffer, static_cast<size_t>(got));
  int status = 0;
  if (::waitpid(pid, &status, 0) != pid) throw std::runtime_error("waitpid failed");
  if (WIFEXITED(status)) outcome.exit_code = WEXITSTATUS(status);
  if (WIFSIGNALED(status)) outcome.signal = WTERMSIG(status);
  return outcome;
}

}  // namespace

std::shared_ptr<mlsys::comm::Store> file_store(const std::string& folder) {
  return std::make_shared<FileStore>(folder);
}

std::vector<Outcome> run_collecting(const Job& job, const std::function<void(Rank&)>& body) {
  std::string folder = (fs::temp_directory_path() / "mlsys-test-XXXXXX").string();
  if (::mkdtemp(folder.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
  std::vector<std::pair<pid_t, int>> children;
  for (int rank = 0; rank < job.size; ++rank) {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0) throw std::runtime_error("pipe failed");
    const pid_t pid = ::fork();
    if (pid < 0) throw std::runtime_error("fork failed");
    if (pid == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);  // a stopped one, too
      for (const auto& [other, pipe] : children) ::close(pipe);
      ::close(ends[0]);
      be_rank(job, rank, folder, ends[1], body);
    }
    ::close(ends[1]);
    children.emplace_back(pid, ends[0]);
  }
  std::vector<Outcome> outcomes;
  for (const auto& [pid, pipe] : children) {
    outcomes.push_back(outcome_of(pid, pipe, children));
    ::close(pipe);
  }
  fs::remove_all(folder);
  return outcomes;
}

void run(const Job& job, const std::function<void(Rank&)>& body) {
  std::string errors;
  const std::vector<Outcome> outcomes = run_collecting(job, body);
  for (size_t rank = 0; rank < outcomes.size(); ++rank) {
    const Outcome& outcome = outcomes[rank];
    if (outcome.exit_code == 0 && outcome.signal == 0) continue;
    errors += "\n  rank " + std::to_string(rank) + " of " + describe(job) + ": exit code " +
              std::to_string(outcome.exit_code) + ", signal " + std::to_string(outcome.signal) + ": " +
              outcome.error;
  }
  if (!errors.empty()) throw check::Failure(errors);
}

std::vector<Job> topologies() {
  std::vector<Job> jobs;
  for (const int size : {1, 2, 3, 4}) jobs.push_back({.size = size});
  jobs.push_back({.size = 2, .locality = {0, 1}});
  jobs.push_back({.size = 3, .locality = {0, 1, 2}});
  jobs.push_back({.size = 3, .locality = {0, 0, 1}});
  jobs.push_back({.size = 4, .locality = {0, 0, 1, 1}});
  jobs.push_back({.size = 4, .locality = {0, 1, 0, 1}});
  jobs.push_back({.size = 4, .locality = {0, 0, 0, 1}});
  jobs.push_back({.size = 5, .locality = {0, 1, 1, 1, 2}});
  return jobs;
}

std::string describe(const Job& job) {
  std::string text = std::to_string(job.size) + " ranks";
  if (job.locality.empty()) return text;
  text += " on hosts";
  for (const int host : job.locality) text += " " + std::to_string(host);
  return text;
}

void post(const Rank& rank, const std::string& name, const std::string& text) {
  write_atomically(rank.folder + "/post-" + name, text.data(), text.size());
}

std::string await_post(const Rank& rank, const std::string& name) {
  const std::vector<uint8_t> bytes = await_file(rank.folder + "/post-" + name, std::chrono::seconds(60));
  return {bytes.begin(), bytes.end()};
}

void meet(const Rank& rank, const std::string& name) {
  post(rank, name + "-" + std::to_string(rank.rank), "x");
  for (int other = 0; other < rank.size; ++other) await_post(rank, name + "-" + std::to_string(other));
}

}  // namespace ranks
