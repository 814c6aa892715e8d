// Scores a bundle's conformance.jsonl with its model on the device itself, and measures: JSON on stdout.
//
//   score MODEL.gguf CONFORMANCE.jsonl [threads=4] [rounds=5] [seconds of rest between rounds=20]
//
// A label's score is the sum over its ids of log softmax over the whole vocabulary behind prompt_ids,
// as the files were scored. A round computes every prompt whole, then generates GENERATED tokens.
// Power is the battery's current times its voltage, without that of the rest before the round.
// What a device does not tell is null.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "llama.h"
#include "meters.h"
#include "rows.h"

static constexpr int GENERATED = 64;

static std::string repacked;  // MiB of weights in the layout of the processor's own kernels, as llama.cpp logs it

static void keep_log(ggml_log_level level, const char * text, void *) {
    const char * found = strstr(text, "CPU_REPACK model buffer size =");
    if (found) repacked = std::to_string(strtod(strchr(found, '=') + 1, nullptr));
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

static const float * decode(llama_context * context, std::vector<llama_token> & ids) {
    if (llama_decode(context, llama_batch_get_one(ids.data(), ids.size()))) fail("llama.cpp could not compute a row");
    return llama_get_logits_ith(context, -1);
}

static const float * decode_prompt(llama_context * context, Row & row) {
    llama_memory_clear(llama_get_memory(context), true);
    return decode(context, row.prompt);
}

static double log_softmax(const float * logits, int size, llama_token token) {
    const double most = *std::max_element(logits, logits + size);
    double sum = 0;
    for (int i = 0; i < size; i++) sum += std::exp(logits[i] - most);
    return logits[token] - most - std::log(sum);
}

static std::vector<double> score(llama_context * context, int size, Row & row) {
    std::vector<double> scores;
    const float * logits = decode_prompt(context, row);
    for (const Label & label : row.labels) scores.push_back(log_softmax(logits, size, label.ids[0]));
    for (size_t i = 0; i < scores.size(); i++) {
        const std::vector<llama_token> & ids = row.labels[i].ids;
        if (ids.size() > 1) decode_prompt(context, row);  // again: not every model's memory can go back a token
        for (size_t at = 1; at < ids.size(); at++) {
            std::vector<llama_token> before = {ids[at - 1]};
            scores[i] += log_softmax(decode(context, before), size, ids[at]);
        }
    }
    return scores;
}

static int likeliest(const float * logits, int size) {
    return std::max_element(logits, logits + size) - logits;
}

static void generate(llama_context * context, const llama_vocab * vocabulary, const float * logits) {
    const int size = llama_vocab_n_tokens(vocabulary);
    for (int i = 0; i < GENERATED; i++) {  // on and on, past what would end an answer: a rate, not a text
        std::vector<llama_token> next = {likeliest(logits, size)};
        logits = decode(context, next);
    }
}

struct Timed { double seconds; Number watts; };

template <typename Work> static Timed timed(Work work) {
    Timed result;
    const auto start = Clock::now();
    result.watts = mean_watts([&] {
        work();
        result.seconds = seconds_since(start);
    });
    return result;
}

static std::string measured(const char * name, int tokens, const Timed & run, const Number & idle) {
    Number joules;  // above what the device takes at rest
    if (run.watts && idle) joules = (*run.watts - *idle) * run.seconds / tokens;
    return std::string("\"") + name + "\": {\"tokens\": " + std::to_string(tokens) + ", \"seconds\": " +
           json(run.seconds) + ", \"watts\": " + json(run.watts) + ", \"joules_a_token\": " + json(joules) + "}";
}

static std::string measure_round(llama_context * context, const llama_vocab * vocabulary, std::vector<Row> & rows, int rest) {
    const Number idle = mean_watts([&] { std::this_thread::sleep_for(std::chrono::seconds(rest)); });
    const Number before = processor_celsius();
    int tokens = 0;
    const float * logits = nullptr;
    const Timed prompts = timed([&] { for (Row & row : rows) logits = decode_prompt(context, row), tokens += row.prompt.size(); });
    const Timed generation = timed([&] { generate(context, vocabulary, logits); });
    return "{" + measured("prompt", tokens, prompts, idle) + ", " + measured("generation", GENERATED, generation, idle) +
           ", \"watts_at_rest\": " + json(idle) + ", \"celsius\": [" + json(before) + ", " + json(processor_celsius()) + "]}";
}

static std::vector<Row> read_rows(const char * path) {
    std::ifstream file(path);
    std::vector<Row> rows;
    for (std::string line; std::getline(file, line);) rows.push_back(parse(line));
    if (rows.empty()) fail(std::string(path) + ": no rows: push the bundle's conformance.jsonl");
    return rows;
}

static llama_context * open_context(llama_model * model, const std::vector<Row> & rows, int threads) {
    size_t longest = 0;
    const int size = llama_vocab_n_tokens(llama_model_get_vocab(model));
    auto check = [&](const std::vector<llama_token> & ids) {
        for (const llama_token id : ids)
            if (id < 0 || id >= size) fail("conformance.jsonl is another model's: it has ids that this vocabulary has not");
    };
    for (const Row & row : rows) {
        check(row.prompt);
        for (const Label & label : row.labels) {
            check(label.ids);
            longest = std::max(longest, row.prompt.size() + label.ids.size());
        }
    }
    llama_context_params parameters = llama_context_default_params();
    parameters.n_ctx = longest + GENERATED;
    parameters.n_batch = longest;
    parameters.n_threads = parameters.n_threads_batch = threads;
    llama_context * context = llama_init_from_model(model, parameters);
    if (!context) fail("llama.cpp cannot make room for the longest prompt: too little memory?");
    return context;
}

static void print_scores(llama_context * context, int size, std::vector<Row> & rows) {
    int right = 0;
    for (Row & row : rows) {
        const std::vector<double> scores = score(context, size, row);
        printf("%s\n{\"id\": %s, \"labels\": {", &row == rows.data() ? "" : ",", row.id.c_str());
        for (size_t i = 0; i < scores.size(); i++)
            printf("%s%s: %s", i ? ", " : "", row.labels[i].word.c_str(), json(scores[i]).c_str());
        printf("}}");
        right += row.labels[std::max_element(scores.begin(), scores.end()) - scores.begin()].word == row.answer;
    }
    fprintf(stderr, "%d of %zu answers as scored\n", right, rows.size());
}

int main(int count, char ** arguments) {
    if (count < 3) fail("score MODEL.gguf CONFORMANCE.jsonl [threads] [rounds] [seconds of rest]");
    auto option = [&](int at, int otherwise) { return count > at ? atoi(arguments[at]) : otherwise; };
    std::vector<Row> rows = read_rows(arguments[2]);
    const int threads = std::max(1, option(3, 4));
    llama_log_set(keep_log, nullptr);
    llama_backend_init();
    const auto start = Clock::now();
    llama_model * model = llama_model_load_from_file(arguments[1], llama_model_default_params());
    if (!model) fail(std::string(arguments[1]) + ": llama.cpp cannot load it: push it again, compare SHA256SUMS");
    llama_context * context = open_context(model, rows, threads);
    const double load = seconds_since(start);
    const llama_vocab * vocabulary = llama_model_get_vocab(model);

    printf("{\"rows\": [");
    print_scores(context, llama_vocab_n_tokens(vocabulary), rows);
    printf("],\n\"rounds\": [");
    for (int round = 0; round < option(4, 5); round++)
        printf("%s\n%s", round ? "," : "", measure_round(context, vocabulary, rows, option(5, 20)).c_str());
    printf("],\n\"threads\": %d, \"load_seconds\": %s, \"peak_memory_bytes\": %s, \"repacked_mib\": %s, \"kernels\": \"%s\"}\n",
           threads, json(load).c_str(), json(peak_memory()).c_str(), repacked.empty() ? "0" : repacked.c_str(),
           llama_print_system_info());
}
