/* text.h -- free text inside a call: where the output parser would end a parameter's value.
 *
 * A string parameter is bare text, and the text may hold the very tags that
 * end it. The parser (engine/chat/output.c) looks ahead to decide; the matcher
 * sees bytes one after the other and so keeps both worlds: behind each
 * "</parameter>" the value may be over, or it goes on. The world in which it
 * goes on dies as soon as the parser would say that it ended:
 *
 *   </parameter>  and, behind white space, one of  </tool_call>  </parameter>
 *                 <function=  <tool_call> <function=  <parameter=
 *   </function>   and then one of  </tool_call>  <function=  <tool_call> <function=
 *   </tool_call>  and then  <tool_call> <function=
 *   <parameter=X> at a line's start, with X declared and not used yet
 *
 * It is a little stricter than the parser, never laxer: an undeclared
 * parameter behind "</parameter>" is not waited for, nor are names of
 * functions. A quoted call, from "<tool_call>\n<function=" at a line's start
 * to its "</tool_call>", is data in both. Text is UTF-8 without NUL.
 *
 * The automaton is the same for all grammars: the vocabulary keeps one.
 *
 * Threads    immutable once made. */
#ifndef DE_GRAMMAR_TEXT_H
#define DE_GRAMMAR_TEXT_H

#include <stdbool.h>
#include <stdint.h>

#include "base/arena.h"
#include "delta/chat.h"
#include "delta/error.h"

enum {                     /* what a state of the text automaton says of the bytes that led to it */
       DE_TEXT_CLOSER = 1, /* a whole "</parameter>" */
       DE_TEXT_PARAM = 2,  /* "<parameter=" at a line's start */
       DE_TEXT_NEST = 4,   /* a quoted call opened */
       DE_TEXT_UNNEST = 8, /* and closed */
       /* "</parameter>", white space, "</function>"; or a line "</parameter>" and then "</": while
        * required parameters are missing the value is not data that goes on there. Otherwise a
        * model that wants to end the call too early would be led on inside the value. */
       DE_TEXT_FUNCTION = 16,
       DE_TEXT_NEUTRAL = 32, /* nothing is pending: text without '<' comes back to such a state */
       DE_TEXT_LINE = 64,    /* what is pending of a closer had a newline before it */
       DE_TEXT_SLICED = 128, /* so is a neutral one in the middle of a character */
       DE_TEXT_PENDING = 8,  /* shift: bytes of "</parameter>" that are there */
       DE_TEXT_PENDING_MASK = 15,
       DE_TEXT_NEST_MAX = 15,
};

typedef struct de_text_auto {
    uint16_t (*next)[256]; /* UINT16_MAX: dead */
    uint16_t *marks;
    uint32_t n;
    uint16_t start, base, nested; /* at a value's start; in a line; in a line of a quoted call */
} de_text_auto;

int de_text_auto_make(de_text_auto *t, delta_error *err);
void de_text_auto_done(de_text_auto *t);

/* Names as a trie; node 0 is the root. */
typedef struct de_name_node {
    uint32_t child, next; /* 0: none */
    uint32_t index;       /* of the name that ends here, or UINT32_MAX */
    uint8_t byte;
} de_name_node;

struct de_names {
    de_name_node *nodes; /* in the arena */
    uint32_t n;
};
typedef struct de_names de_names;

/* names: n of them, different; empty ones are left out. NULL when the arena is full. */
de_names *de_names_make(de_arena *a, const delta_str *names, uint32_t n);
/* The node behind this byte, or 0. */
uint32_t de_names_step(const de_names *t, uint32_t node, uint8_t byte);

#endif
