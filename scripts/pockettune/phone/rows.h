// The rows of a bundle's conformance.jsonl, as scripts/make_bundle.py writes them.
//
// A quote inside a JSON string has a backslash before it, so `"key": ` cannot stand in a text.
// Strings stay as they are written there, escapes and all, and go out so again.

#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "llama.h"

struct Label { std::string word; std::vector<llama_token> ids; };
struct Row { std::string id, answer; std::vector<llama_token> prompt; std::vector<Label> labels; };

[[noreturn]] static void fail(const std::string & message) {
    fprintf(stderr, "error: %s\n", message.c_str());
    exit(2);
}

static size_t behind(const std::string & line, const std::string & key, size_t from) {
    const size_t found = line.find("\"" + key + "\": ", from);
    if (found == std::string::npos) fail("conformance.jsonl: a row without " + key + ": take the bundle's own");
    return found + key.size() + 4;
}

static std::string raw_string(const std::string & line, size_t & at) {
    const size_t start = at++;
    for (; at < line.size() && line[at] != '"'; at++) at += line[at] == '\\';
    return line.substr(start, ++at - start);
}

static std::vector<llama_token> numbers(const std::string & line, size_t & at) {
    std::vector<llama_token> found;
    for (char * end; at < line.size() && line[at] != ']'; at = end - line.data()) {
        const char * start = line.data() + at + 1;  // behind [ or a comma
        found.push_back(strtol(start, &end, 10));
        if (end == start) fail("conformance.jsonl: ids are not numbers: take the bundle's own");
    }
    return found;
}

static Row parse(const std::string & line) {
    Row row;
    size_t at = behind(line, "id", 0);
    row.id = raw_string(line, at);
    at = behind(line, "prompt_ids", at);
    row.prompt = numbers(line, at);
    at = behind(line, "labels", at);
    while (line[at] == '{' || line[at] == ',') {
        at += line[at] == '{' ? 1 : 2;
        Label label;
        label.word = raw_string(line, at);
        at = behind(line, "ids", at);
        label.ids = numbers(line, at);
        at = line.find('}', at) + 1;
        if (label.ids.empty()) fail("conformance.jsonl: a label without ids: take the bundle's own");
        row.labels.push_back(label);
    }
    at = behind(line, "answer", at);
    row.answer = raw_string(line, at);
    return row;
}
