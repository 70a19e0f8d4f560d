/* scan.c -- see scan.h. */
#include "grammar/scan.h"

#include <string.h>

enum { SPACE_MAX = 1024 }; /* the parser's */

static const char think_close[] = "</think>", think_open[] = "<think>", call_open[] = "<tool_call>",
                  function_open[] = "<function=", function_close[] = "</function>",
                  param_open[] = "<parameter=";

enum {                  /* stages of a call: bytes of "<tool_call>", then these */
       WRAP_SPACE = 11, /* white space */
       WRAP_FUNCTION,   /* + bytes of "<function=" */
       WRAP_NAME = WRAP_FUNCTION + 10,
       /* of one without wrapper: bytes of "<function=", then these */
       BARE_NAME = 10,
       BARE_SPACE,
       BARE_PARAM,                /* + bytes of "<parameter=" */
       BARE_END = BARE_PARAM + 11 /* + bytes of "</function>" */
};

void de_scan_begin(de_scan *s, bool thinking)
{
    *s = (de_scan){ .thinking = thinking, .at_start = true };
}

bool de_scan_in_name(const de_scan *s)
{
    return !s->thinking && s->wrap >= WRAP_NAME;
}

/* ---- the line */

static void line_end(de_scan *s)
{
    if (s->fence) {
        if (s->mark == s->fence && s->run >= s->fence_run && s->only_run)
            s->fence = 0;
    } else if (s->mark && s->run >= 3) {
        s->fence = s->mark;
        s->fence_run = s->run;
    }
    s->begun = s->run_ended = s->only_run = false;
    s->blank = 0;
    s->mark = 0;
    s->run = 0;
}

static void line_add(de_scan *s, char c)
{
    if (c == '\n') {
        line_end(s);
        s->last = c;
        return;
    }
    if (!s->begun && c == ' ' && s->blank < 3) {
        s->blank++;
    } else if (!s->begun) {
        s->begun = true;
        if (c == '`' || c == '~') {
            s->mark = c;
            s->run = 1;
            s->only_run = true;
        }
    } else if (s->mark && c == s->mark && !s->run_ended) {
        s->run++;
    } else if (s->mark) {
        s->run_ended = true;
        if (c != ' ' && c != '\t' && c != '\r')
            s->only_run = false;
        if (c == '`' && s->mark == '`')
            s->mark = 0;
    }
    s->last = c;
}

static bool fenced(const de_scan *s)
{
    return s->fence || (s->mark && s->run >= 3);
}

/* ---- white space: Python's str.isspace(), byte by byte */

enum {
    SPACE_C2 = 1,
    SPACE_E1,
    SPACE_E1_9A,
    SPACE_E2,
    SPACE_E2_80,
    SPACE_E2_81,
    SPACE_E3,
    SPACE_E3_80
};

static bool space_step(uint8_t *part, uint8_t b)
{
    switch (*part) {
    case 0:
        if ((b >= 0x09 && b <= 0x0D) || (b >= 0x1C && b <= 0x20))
            return true;
        *part = b == 0xC2 ? SPACE_C2 : b == 0xE1 ? SPACE_E1 : b == 0xE2 ? SPACE_E2 : SPACE_E3;
        return b == 0xC2 || (b >= 0xE1 && b <= 0xE3);
    case SPACE_C2:
        *part = 0;
        return b == 0x85 || b == 0xA0;
    case SPACE_E1:
        *part = SPACE_E1_9A;
        return b == 0x9A;
    case SPACE_E2:
        *part = b == 0x80 ? SPACE_E2_80 : SPACE_E2_81;
        return b == 0x80 || b == 0x81;
    case SPACE_E2_80:
        *part = 0;
        return (b >= 0x80 && b <= 0x8A) || b == 0xA8 || b == 0xA9 || b == 0xAF;
    case SPACE_E2_81:
        *part = 0;
        return b == 0x9F;
    case SPACE_E3:
        *part = SPACE_E3_80;
        return b == 0x80;
    default: /* E1 9A, E3 80 */
        *part = 0;
        return b == 0x80;
    }
}

/* ---- candidates */

static uint8_t progress(const char *text, uint8_t have, uint8_t b)
{
    return (uint8_t)text[have] == b ? (uint8_t)(have + 1) : 0;
}

static enum de_scan_found name_ends(const de_names *names, uint32_t node, uint32_t *ret_tool)
{
    if (names->nodes[node].index == UINT32_MAX)
        return DE_SCAN_NOTHING;
    *ret_tool = names->nodes[node].index;
    return DE_SCAN_CALL;
}

static enum de_scan_found wrap_step(const de_scan_rules *r, de_scan *s, uint8_t b,
                                    uint32_t *ret_tool)
{
    const de_names *names = s->thinking ? r->names : r->allowed;
    if (s->wrap < WRAP_SPACE) {
        s->wrap = progress(call_open, s->wrap, b);
        s->wrap_space = 0;
        s->wrap_run = 0;
    } else if (s->wrap == WRAP_SPACE) {
        if (b == '<' && s->wrap_space == 0)
            s->wrap = WRAP_FUNCTION + 1;
        else if (s->wrap_run++ >= SPACE_MAX || !space_step(&s->wrap_space, b))
            s->wrap = 0;
    } else if (s->wrap < WRAP_NAME) {
        const uint8_t have = (uint8_t)(s->wrap - WRAP_FUNCTION);
        const bool anew = have == 1 && s->wrap_anew && b == 't';
        const uint8_t n = progress(function_open, have, b);
        s->wrap = anew ? 2 : n ? (uint8_t)(WRAP_FUNCTION + n) : 0;
        s->wrap_name = 0;
    } else if (b == '>') {
        const enum de_scan_found f = name_ends(names, s->wrap_name, ret_tool);
        s->wrap = 0;
        return f != DE_SCAN_NOTHING || s->thinking ? f : DE_SCAN_UNKNOWN;
    } else {
        s->wrap_name = de_names_step(names, s->wrap_name, b);
        if (!s->wrap_name) {
            s->wrap = 0;
            return s->thinking ? DE_SCAN_NOTHING : DE_SCAN_UNKNOWN;
        }
    }
    return DE_SCAN_NOTHING;
}

static enum de_scan_found bare_step(const de_scan_rules *r, de_scan *s, uint8_t b,
                                    uint32_t *ret_tool)
{
    if (s->bare < BARE_NAME) {
        s->bare = progress(function_open, s->bare, b);
        s->bare_name = 0;
    } else if (s->bare == BARE_NAME) {
        if (b == '>') {
            uint32_t tool;
            s->bare = name_ends(r->names, s->bare_name, &tool) == DE_SCAN_CALL ? BARE_SPACE : 0;
            s->bare_space = 0;
            s->bare_run = 0;
        } else if (!(s->bare_name = de_names_step(r->names, s->bare_name, b))) {
            s->bare = 0;
        }
    } else if (s->bare == BARE_SPACE) {
        if (b == '<' && s->bare_space == 0)
            s->bare = BARE_PARAM + 1;
        else if (s->bare_run++ >= SPACE_MAX || !space_step(&s->bare_space, b))
            s->bare = 0;
    } else if (s->bare < BARE_END) {
        const uint8_t have = (uint8_t)(s->bare - BARE_PARAM);
        if (have == 1 && (b == '/' || (b == 'f' && s->bare_anew))) {
            s->bare = b == '/' ? BARE_END + 2 : 2;
            return DE_SCAN_NOTHING;
        }
        const uint8_t n = progress(param_open, have, b);
        s->bare = n ? (uint8_t)(BARE_PARAM + n) : 0;
        if (n == sizeof param_open - 1) {
            s->bare = 0;
            *ret_tool = r->names->nodes[s->bare_name].index;
            return DE_SCAN_BARE_PARAM;
        }
    } else {
        const uint8_t n = progress(function_close, (uint8_t)(s->bare - BARE_END), b);
        s->bare = n ? (uint8_t)(BARE_END + n) : 0;
        if (n == sizeof function_close - 1) {
            s->bare = 0;
            *ret_tool = r->names->nodes[s->bare_name].index;
            return DE_SCAN_BARE_END;
        }
    }
    return DE_SCAN_NOTHING;
}

/* A '<': which candidates begin here? */
static void tag_begins(const de_scan_rules *r, de_scan *s)
{
    const bool call = r->calls && (r->calls_in_fences || !fenced(s)) &&
                      !(s->thinking && (!r->calls_in_reasoning || s->last == '`'));
    s->think = 1;
    s->open = s->at_start;
    if (s->wrap == WRAP_FUNCTION + 1)
        s->wrap_anew = call;
    else if (s->wrap < WRAP_SPACE)
        s->wrap = call;
    const bool bare = call && !s->thinking && (s->last == 0 || s->last == '\n');
    if (s->bare == BARE_PARAM + 1)
        s->bare_anew = bare;
    else if (s->bare < BARE_NAME)
        s->bare = bare;
}

enum de_scan_found de_scan_step(const de_scan_rules *r, de_scan *s, uint8_t b, uint32_t *ret_tool)
{
    enum de_scan_found found = DE_SCAN_NOTHING;
    if (s->think)
        s->think = progress(think_close, s->think, b);
    if (s->open) {
        s->open = progress(think_open, s->open, b);
        s->at_start = s->open > 0;
    }
    if (s->wrap)
        found = wrap_step(r, s, b, ret_tool);
    if (s->bare && found == DE_SCAN_NOTHING)
        found = bare_step(r, s, b, ret_tool);
    if (found != DE_SCAN_NOTHING)
        return found;
    if (s->think == sizeof think_close - 1) {
        const bool ends = s->thinking;
        de_scan_begin(s, false);
        s->at_start = false;
        return ends ? DE_SCAN_THINK_END : DE_SCAN_NOTHING;
    }
    if (s->open == sizeof think_open - 1) {
        const bool thinking = s->thinking;
        de_scan_begin(s, thinking);
        s->at_start = false;
        return DE_SCAN_NOTHING;
    }
    if (b == '<')
        tag_begins(r, s);
    else if (!s->open && !(b >= 0x09 && b <= 0x0D) && !(b >= 0x1C && b <= 0x20))
        s->at_start = false;
    line_add(s, (char)b);
    return DE_SCAN_NOTHING;
}
