# llama.cpp's "common" library serves none of llama-cpp-python's bindings, is forced on by
# that package, and does not compile as a unity build. Without it the build takes a minute
# and a half on two cores instead of eight. Passed as CMAKE_PROJECT_llama.cpp_INCLUDE.
set(LLAMA_BUILD_COMMON OFF CACHE BOOL "" FORCE)
