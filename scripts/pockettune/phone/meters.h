// What a device tells of itself through Linux's files: power, temperature, memory, time. Else nothing.

#pragma once

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <optional>
#include <string>
#include <thread>

using Clock = std::chrono::steady_clock;
using Number = std::optional<double>;

static constexpr auto SAMPLE_EVERY = std::chrono::milliseconds(200);

static double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

static std::string json(const Number & value) {
    char text[32];
    snprintf(text, sizeof text, "%.6f", value.value_or(0));
    return value && std::isfinite(*value) ? text : "null";
}

static Number read_number(const std::string & path) {
    double value;
    return std::ifstream(path) >> value ? Number(value) : std::nullopt;
}

static const std::string BATTERY = "/sys/class/power_supply/battery/";

// Of a battery that is drawn from; under a charger it tells nothing of what is used. The kernel gives
// microamperes and microvolts, with a sign that differs by maker. Some give milliamperes, which then
// come out below what any device takes that is awake.
static Number battery_watts() {
    std::string status;
    std::ifstream(BATTERY + "status") >> status;
    const Number current = read_number(BATTERY + "current_now"), voltage = read_number(BATTERY + "voltage_now");
    if (status != "Discharging" || !current || !voltage) return std::nullopt;
    const double watts = std::fabs(*current) * *voltage * 1e-12;
    return watts > 0.01 ? Number(watts) : std::nullopt;
}

static Number processor_celsius() {  // of the hottest zone of the processor
    Number hottest;
    for (int zone = 0; zone < 100; zone++) {
        const std::string folder = "/sys/class/thermal/thermal_zone" + std::to_string(zone) + "/";
        std::string type;
        std::ifstream(folder + "type") >> type;
        const Number milli = type.find("cpu") == 0 ? read_number(folder + "temp") : std::nullopt;
        if (milli) hottest = std::max(hottest.value_or(-273), *milli / 1000);
    }
    return hottest;
}

static Number peak_memory() {  // bytes
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);)
        if (line.rfind("VmHWM:", 0) == 0) return strtod(line.c_str() + 6, nullptr) * 1024;
    return std::nullopt;
}

// Runs `work` while the battery's power is sampled; returns its mean in watts, if the device tells it.
template <typename Work> static Number mean_watts(Work work) {
    std::atomic<bool> done = false;
    double sum = 0;
    int samples = 0;
    std::thread sampler([&] {
        for (; !done; std::this_thread::sleep_for(SAMPLE_EVERY))
            if (const Number watts = battery_watts()) sum += *watts, samples++;
    });
    work();
    done = true;
    sampler.join();
    return samples ? Number(sum / samples) : std::nullopt;
}
