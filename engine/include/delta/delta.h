/* delta.h -- everything a user of the engine needs, and its version. */
#ifndef DELTA_DELTA_H
#define DELTA_DELTA_H

#include "delta/cache.h"
#include "delta/chat.h"
#include "delta/engine.h"
#include "delta/error.h"
#include "delta/grammar.h"
#include "delta/output.h"
#include "delta/sampling.h"
#include "delta/session.h"
#include "delta/step.h"
#include "delta/tokenizer.h"

#define DELTA_VERSION "0.1.0"

#endif
