// Which threads of a block, and which blocks, run first.
#include "cuda_runtime.h"

extern "C" void miras_emulator_backwards(int whether) { emulator::backwards = whether; }
