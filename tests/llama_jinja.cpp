// Renders chat templates in llama.cpp's own engine (common/jinja), for test_task_template.py.
// stdin: {"template", "talks": [[message, …], …]}; stdout: {"system": whether llama.cpp takes the template
// to know system messages, "rendered": [text, …]}.

#include "jinja/caps.h"
#include "jinja/parser.h"
#include "jinja/runtime.h"
#include "json.h"

#include <cstdlib>
#include <iostream>
#include <iterator>

extern "C" void ggml_abort(const char *, int, const char *, ...) { std::abort(); }

int main() {
    const std::string text((std::istreambuf_iterator<char>(std::cin)), {});
    const auto given = common_json::parse(text);
    const auto source = given.at("template").get<std::string>();
    auto program = jinja::parse_from_tokens(jinja::lexer().tokenize(source));
    auto rendered = common_json::array();
    for (const auto & talk : given.at("talks")) {
        jinja::context context(source);
        jinja::global_from_json(context, common_json{{"messages", talk}, {"add_generation_prompt", true}}, true);
        const auto parts = jinja::runtime::gather_string_parts(jinja::runtime(context).execute(program));
        rendered.push_back(parts->as_string().str());
    }
    const bool system = jinja::caps_get(program).supports_system_role;
    std::cout << common_json{{"system", system}, {"rendered", rendered}}.dump();
}
