# Build a program with an installed libmm1, by its CMake package and by pkg-config.
file(REMOVE_RECURSE ${work})
set(prefix ${work}/prefix)
set(source ${CMAKE_CURRENT_LIST_DIR}/consumer)

function(run)
  execute_process(COMMAND ${ARGN} COMMAND_ERROR_IS_FATAL ANY)
endfunction()

run(${CMAKE_COMMAND} --install ${build} --prefix ${prefix})
foreach(file include/mm1.h ${libdir}/libmm1.so ${libdir}/${soname} ${libdir}/cmake/mm1/mm1Config.cmake ${libdir}/pkgconfig/mm1.pc
        share/mm1/manifest.json)
  if(NOT EXISTS ${prefix}/${file})
    message(FATAL_ERROR "${file} was not installed")
  endif()
endforeach()

run(${CMAKE_COMMAND} -S ${source} -B ${work}/cmake -DCMAKE_C_COMPILER=${compiler} -DCMAKE_PREFIX_PATH=${prefix})
run(${CMAKE_COMMAND} --build ${work}/cmake)
run(${work}/cmake/consumer)

set(ENV{PKG_CONFIG_PATH} ${prefix}/${libdir}/pkgconfig)
find_program(pkg_config NAMES pkg-config pkgconf)
if(pkg_config)
  execute_process(COMMAND ${pkg_config} --cflags --libs mm1 OUTPUT_VARIABLE flags OUTPUT_STRIP_TRAILING_WHITESPACE
                          COMMAND_ERROR_IS_FATAL ANY)
  separate_arguments(flags UNIX_COMMAND "${flags}")
  run(${compiler} -std=c99 -pedantic -Wall -Wextra -Werror ${source}/main.c -o ${work}/consumer ${flags})
  set(ENV{LD_LIBRARY_PATH} ${prefix}/${libdir})
  run(${work}/consumer)
endif()
