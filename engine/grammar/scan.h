/* scan.h -- text that is free: looking out for the end of thinking and for calls.
 *
 * Mirrors what the output parser (engine/chat/output.c) does with reasoning and
 * content: where "</think>" ends the one, which "<tool_call>" opens a call, and
 * which do not because of a fence or a backtick. It decides byte by byte and
 * is a value: copied, compared to nothing, stepped.
 *
 * Threads    any; the rules are immutable. */
#ifndef DE_GRAMMAR_SCAN_H
#define DE_GRAMMAR_SCAN_H

#include <stdbool.h>
#include <stdint.h>

#include "grammar/text.h"

typedef struct de_scan_rules {
    bool calls;              /* calls are looked for at all */
    bool calls_in_reasoning; /* in reasoning too */
    bool calls_in_fences;    /* and in fenced blocks */
    const de_names *names;   /* of all declared tools */
    const de_names *allowed; /* of those that may be called */
} de_scan_rules;

typedef struct de_scan {
    bool thinking;
    bool at_start; /* nothing but white space so far */
    /* the line, as the parser keeps it */
    bool begun, run_ended, only_run;
    uint8_t blank;
    char mark, last, fence;
    uint32_t run, fence_run;
    /* how much is there of: "</think>"; "<think>" at the start; a call; a call without wrapper */
    uint8_t think, open, wrap, bare;
    bool wrap_anew, bare_anew;      /* the '<' in the middle may open another */
    uint8_t wrap_space, bare_space; /* of a white space of several bytes */
    uint16_t wrap_run, bare_run;    /* bytes of white space */
    uint32_t wrap_name, bare_name;
} de_scan;

enum de_scan_found {
    DE_SCAN_NOTHING,
    DE_SCAN_THINK_END,  /* reasoning is over */
    DE_SCAN_CALL,       /* "<tool_call> <function=NAME>" */
    DE_SCAN_BARE_PARAM, /* "<function=NAME> <parameter=" at a line's start */
    DE_SCAN_BARE_END,   /* "<function=NAME> </function>" */
    DE_SCAN_UNKNOWN,    /* in content, a call of a tool that is not declared */
};

void de_scan_begin(de_scan *s, bool thinking);
/* ret_tool: of the calls that were found. */
enum de_scan_found de_scan_step(const de_scan_rules *r, de_scan *s, uint8_t byte,
                                uint32_t *ret_tool);
/* Nothing is pending that the next bytes could complete. */
static inline bool de_scan_is_calm(const de_scan *s)
{
    return !s->think && !s->wrap && !s->bare;
}
/* In content, inside the name of a call's function: nothing but a declared name may follow. */
bool de_scan_in_name(const de_scan *s);

#endif
