/* output.c -- see output.h: one state machine over the bytes of the model's answer.
 *
 * Bytes wait in p->in. Each state looks at the front of what waits and either
 * consumes some of it or says that it must see more. What it decides depends
 * on the bytes alone, never on where a piece ended: a decision is taken only
 * when no continuation could change it, or when the turn is over, or when
 * HOLD_MAX bytes are there (always the same HOLD_MAX). That is what makes the
 * events the same at every chunking.
 *
 *   REASONING  --</think>--> CONTENT
 *   REASONING, CONTENT  --<tool_call> <function=NAME>--> ARGS
 *   ARGS  --<parameter=NAME>--> VALUE  --closer--> ARGS
 *   ARGS  --</function>--> AFTER  --</tool_call>, other text--> CONTENT
 *
 * The hard part is the end of a value: files that agents write hold the very
 * tags that end it. value_end() and its helpers look at what comes after. */
#include "delta/output.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "base/arena.h"
#include "base/json.h"
#include "base/utf8.h"
#include "chat/schema.h"
#include "chat/text.h"

enum {
    BROKEN_CLOSER_MAX = 32, /* bytes behind "</param" */
    SPACE_MAX = 1024,       /* white space between two tags; past it they do not belong together */
    CHAIN_MAX = 64,         /* undeclared parameters looked through for the end of one value */
    PARAMS_MAX = 1024,      /* of a call; more are dropped */
};

static const delta_str think_open = { "<think>", 7 }, think_close = { "</think>", 8 };
static const delta_str call_open = { "<tool_call>", 11 }, call_close = { "</tool_call>", 12 };
static const delta_str function_open = { "<function=", 10 };
static const delta_str function_close = { "</function>", 11 };
static const delta_str param_open = { "<parameter=", 11 };
static const delta_str param_close = { "</parameter>", 12 };
static const delta_str param_close_start = { "</param", 7 };
static const delta_str nest_open = { "<tool_call>\n<function=", 22 };

enum state { REASONING, CONTENT, ARGS, VALUE, AFTER, ENDED };

/* Answers about text that may not be there yet. */
enum answer { NO, YES, MORE };

/* An event while its text's place may still move. */
typedef struct event {
    delta_out_event e;
    size_t begin; /* in p->text */
} event;

/* Where we are in a line of text: for fences, and for tags that count at a line's start only. */
typedef struct line {
    bool begun;     /* something stands on it */
    unsigned blank; /* spaces before anything else */
    char mark;      /* the fence character that it began with, or 0 */
    size_t run;     /* how many of them */
    bool run_ended;
    bool only_run; /* nothing but blanks after the run */
    char last;     /* the byte before, or 0 */
    char fence;    /* inside a fenced block: its character, or 0 */
    size_t fence_run;
} line;

struct delta_output {
    delta_output_options options; /* without the borrowed tools */
    de_arena arena;               /* of the tools */
    de_tools tools;
    bool parse_calls;
    uint32_t repairs[DELTA_REPAIR_N];

    enum state state;
    bool at_start; /* nothing but white space so far */
    de_text in;    /* waiting bytes: valid UTF-8 from `at` on */
    size_t at;
    bool last;             /* no more will come */
    unsigned char utf8[4]; /* an incomplete character */
    unsigned n_utf8;

    /* text */
    bool lead;     /* white space here leads a text: nobody's */
    de_text blank; /* a run of white space that something must follow */
    line line;

    /* calls */
    uint32_t n_calls, n_complete;
    bool wrapped; /* a </tool_call> is due */
    const de_tool *tool;
    bool call_text; /* inside text that is being dropped */
    bool param_cut; /* the turn ended in the opening tag of a parameter */
    de_text args;   /* of the open call, as sent */
    de_text used;   /* names of its parameters, each with a NUL behind */
    unsigned n_used;
    bool any_param; /* one was written */

    /* a value */
    de_text key, value; /* value: of types that must be seen whole */
    unsigned types;
    bool drop;       /* repeated: goes nowhere */
    bool begun;      /* the leading newline is behind us */
    bool line_start; /* the byte before was a newline */
    bool newline;    /* a newline that is the value's only if something follows */
    bool in_string;  /* the key and an opening quote were sent */
    unsigned nest;   /* calls quoted in the value */
    /* How far the look behind the "</parameter>" at the front got, as offsets from it. */
    struct {
        unsigned links;
        size_t i, search; /* where the next link starts, and where to look for its closer */
    } chain;

    event *events;
    size_t n_events, cap_events;
    de_text text; /* of the events */
    delta_out_event *out;
    size_t cap_out;
    bool failed;
};

/* ---- events */

static void repair(delta_output *p, enum delta_repair which)
{
    p->repairs[which]++;
}

/* Appends to the last event if it is of the same kind and merging is meant. */
static void emit(delta_output *p, enum delta_out_kind kind, const char *s, size_t len)
{
    const bool merges = kind != DELTA_OUT_CALL_START && kind != DELTA_OUT_CALL_END;
    if (len == 0 && merges)
        return;
    const uint32_t call = kind >= DELTA_OUT_CALL_START ? p->n_calls - 1 : 0;
    event *last = p->n_events ? &p->events[p->n_events - 1] : NULL;
    if (!merges || !last || last->e.kind != kind || last->e.call != call) {
        if (p->n_events == p->cap_events) {
            size_t cap = p->cap_events ? 2 * p->cap_events : 16;
            event *more = realloc(p->events, cap * sizeof *more);
            if (!more) {
                p->failed = true;
                return;
            }
            p->events = more;
            p->cap_events = cap;
        }
        last = &p->events[p->n_events++];
        *last = (event){ .e = { .kind = kind, .call = call }, .begin = p->text.len };
    }
    de_text_add(&p->text, s, len);
    last->e.text.len += len;
}

/* The next piece of the arguments: sent, and kept for the end of the call. */
static void emit_args(delta_output *p, const char *s, size_t len)
{
    de_text_add(&p->args, s, len);
    emit(p, DELTA_OUT_CALL_ARGS, s, len);
}

/* ---- looking at waiting bytes */

/* What may be looked at: at most HOLD_MAX bytes. */
typedef struct view {
    const char *s;
    size_t n;
    bool last; /* the turn ends behind it */
    bool full; /* more cannot be asked for */
} view;

static view look(const delta_output *p)
{
    const size_t n = p->in.len - p->at;
    const bool full = n >= DELTA_OUTPUT_HOLD_MAX;
    return (view){ .s = n ? p->in.p + p->at : "",
                   .n = full ? DELTA_OUTPUT_HOLD_MAX : n,
                   .last = p->last && n <= DELTA_OUTPUT_HOLD_MAX,
                   .full = full };
}

static enum answer more_or_no(const view *v)
{
    return v->last ? NO : MORE;
}

/* As if something followed: what is MORE in this view, and not to be had, is a tag that the end of
 * the turn cut in two. */
static view without_end(const view *v)
{
    view w = *v;
    w.last = false;
    return w;
}

/* Does `what` stand at i? */
static enum answer match(const view *v, size_t i, delta_str what)
{
    const size_t have = v->n - i, n = have < what.len ? have : what.len;
    if (n && memcmp(v->s + i, what.p, n) != 0)
        return NO;
    return n == what.len ? YES : more_or_no(v);
}

static size_t skip_space(const view *v, size_t i)
{
    const size_t from = i;
    for (size_t n; i < v->n && i - from < SPACE_MAX;) {
        if ((n = de_space_at_start(v->s + i, v->n - i)) == 0)
            break;
        i += n;
    }
    return i;
}

/* A function's name from i up to '>'. */
static enum answer function_name(const delta_output *p, const view *v, size_t i, bool declared,
                                 size_t *ret_end)
{
    bool odd = false; /* what only a declared name may hold */
    for (size_t k = i; k < v->n; k++) {
        const char c = v->s[k];
        const delta_str name = { v->s + i, k - i };
        if (c == '>') {
            if (name.len == 0 || ((odd || declared) && !de_tools_find(&p->tools, name)))
                return NO;
            *ret_end = k;
            return YES;
        }
        odd |= strchr("\"'`{}<", c) != NULL || de_space_at_start(v->s + k, v->n - k) > 0;
        if (k - i >= DELTA_OUTPUT_NAME_MAX)
            return NO;
        if ((odd || declared) && !de_tools_has_prefix(&p->tools, (delta_str){ name.p, k - i + 1 }))
            return NO;
    }
    return more_or_no(v);
}

/* "<function=NAME>" at i. */
static enum answer function_at(const delta_output *p, const view *v, size_t i, bool declared,
                               delta_str *ret_name, size_t *ret_end)
{
    enum answer a = match(v, i, function_open);
    size_t end;
    if (a == YES)
        a = function_name(p, v, i + function_open.len, declared, &end);
    if (a == YES) {
        *ret_name = (delta_str){ v->s + i + function_open.len, end - i - function_open.len };
        *ret_end = end + 1;
    }
    return a;
}

/* "<tool_call>", white space, "<function=NAME>" at i. */
static enum answer call_at(const delta_output *p, const view *v, size_t i, bool declared,
                           delta_str *ret_name, size_t *ret_end)
{
    enum answer a = match(v, i, call_open);
    if (a != YES)
        return a;
    return function_at(p, v, skip_space(v, i + call_open.len), declared, ret_name, ret_end);
}

/* Either of them. */
static enum answer opener_at(const delta_output *p, const view *v, size_t i, bool declared)
{
    delta_str name;
    size_t end;
    enum answer a = call_at(p, v, i, declared, &name, &end);
    return a != NO ? a : function_at(p, v, i, declared, &name, &end);
}

/* "<parameter=NAME>" at i, NAME not empty, on one line, without '<'. */
static enum answer param_at(const view *v, size_t i, delta_str *ret_name, size_t *ret_end)
{
    enum answer a = match(v, i, param_open);
    if (a != YES)
        return a;
    const size_t from = i + param_open.len;
    for (size_t k = from; k < v->n; k++) {
        const char c = v->s[k];
        if (c == '>' && k > from) {
            *ret_name = (delta_str){ v->s + from, k - from };
            *ret_end = k + 1;
            return YES;
        }
        if (c == '>' || c == '<' || c == '\n' || c == 0 || k - from >= DELTA_OUTPUT_NAME_MAX)
            return NO;
    }
    return more_or_no(v);
}

/* ---- the line that text is on */

static void line_reset(line *l)
{
    *l = (line){ 0 };
}

static void line_end(line *l)
{
    if (l->fence) {
        if (l->mark == l->fence && l->run >= l->fence_run && l->only_run)
            l->fence = 0;
    } else if (l->mark && l->run >= 3) {
        l->fence = l->mark;
        l->fence_run = l->run;
    }
    *l = (line){ .fence = l->fence, .fence_run = l->fence_run };
}

static void line_add(line *l, const char *s, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const char c = s[i];
        if (c == '\n') {
            line_end(l);
        } else if (!l->begun && c == ' ' && l->blank < 3) {
            l->blank++;
        } else if (!l->begun) {
            l->begun = true;
            if (c == '`' || c == '~') {
                l->mark = c;
                l->run = 1;
                l->only_run = true;
            }
        } else if (l->mark && c == l->mark && !l->run_ended) {
            l->run++;
        } else if (l->mark) {
            l->run_ended = true;
            if (c != ' ' && c != '\t' && c != '\r')
                l->only_run = false;
            if (c == '`' && l->mark == '`') /* code in a line, not a fence */
                l->mark = 0;
        }
        l->last = c;
    }
}

/* Calls do not count here. */
static bool line_fenced(const line *l)
{
    return l->fence || (l->mark && l->run >= 3);
}

static bool line_at_start(const line *l)
{
    return l->last == 0 || l->last == '\n';
}

/* ---- text */

static enum delta_out_kind text_kind(const delta_output *p)
{
    return p->state == REASONING ? DELTA_OUT_REASONING : DELTA_OUT_CONTENT;
}

/* White space waits in p->blank until something follows it in the same text. What is too much is
 * dropped, character by character, so that cuts make no difference. */
static void put_blank(delta_output *p, delta_str s)
{
    if (p->lead)
        return;
    size_t room = DELTA_OUTPUT_HOLD_MAX - p->blank.len;
    if (s.len > room) {
        if (p->blank.len < DELTA_OUTPUT_HOLD_MAX)
            repair(p, DELTA_REPAIR_HOLD_FULL);
        while (room && (s.p[room] & 0xC0) == 0x80)
            room--;
        de_text_add(&p->blank, s.p, room);
        while (p->blank.len < DELTA_OUTPUT_HOLD_MAX && !p->blank.failed)
            de_text_add(&p->blank, " ", 1); /* full, whatever the character that did not fit */
        return;
    }
    de_text_add(&p->blank, s.p, s.len);
}

static void drop_blank(delta_output *p)
{
    p->blank.len = 0;
    p->lead = true;
}

/* Consumes n bytes as text, one run of white space or of other characters after the other: a run
 * is dealt with in the same way whether it comes in one piece or in many. */
static void put_text(delta_output *p, size_t n)
{
    const char *s = p->in.p + p->at;
    line_add(&p->line, s, n);
    p->at += n;
    for (size_t i = 0; i < n;) {
        const size_t from = i;
        size_t k = de_space_at_start(s + i, n - i);
        const bool blank = k > 0;
        do
            i += blank ? k : 1;
        while (i < n && ((k = de_space_at_start(s + i, n - i)) > 0) == blank);
        if (blank) {
            put_blank(p, (delta_str){ s + from, i - from });
            continue;
        }
        emit(p, text_kind(p), p->blank.p, p->blank.len);
        emit(p, text_kind(p), s + from, i - from);
        p->blank.len = 0;
        p->lead = p->at_start = false;
    }
}

static void begin_call(delta_output *p, delta_str name, bool wrapped)
{
    if (p->state == REASONING) {
        repair(p, DELTA_REPAIR_CALL_IN_REASONING);
        drop_blank(p); /* reasoning is over, and so is its last white space */
    }
    p->state = ARGS;
    p->at_start = false;
    p->wrapped = wrapped;
    p->tool = de_tools_find(&p->tools, name);
    p->call_text = p->any_param = false;
    p->args.len = p->used.len = 0;
    p->n_used = 0;
    if (!p->tool)
        repair(p, DELTA_REPAIR_TOOL_UNKNOWN);
    p->n_calls++;
    emit(p, DELTA_OUT_CALL_START, name.p, name.len);
}

/* A bare call must go on like one. */
static enum answer bare_call_at(const delta_output *p, const view *v, delta_str *ret_name,
                                size_t *ret_end)
{
    enum answer a = function_at(p, v, 0, true, ret_name, ret_end);
    if (a != YES)
        return a;
    size_t i = skip_space(v, *ret_end);
    a = match(v, i, param_open);
    return a != NO ? a : match(v, i, function_close);
}

/* At a '<' in reasoning or content. MORE: wait. */
static enum answer text_tag(delta_output *p, const view *v)
{
    enum answer a = match(v, 0, think_close);
    if (a == MORE)
        return MORE;
    if (a == YES) {
        if (p->state == CONTENT)
            repair(p, DELTA_REPAIR_THINK_TAG);
        p->state = CONTENT;
        p->at_start = false;
        p->at += think_close.len;
        drop_blank(p);
        line_reset(&p->line);
        return YES;
    }
    if (p->at_start) {
        a = match(v, 0, think_open);
        if (a == MORE)
            return MORE;
        if (a == YES) {
            repair(p, DELTA_REPAIR_THINK_TAG);
            p->at_start = false;
            p->at += think_open.len;
            line_reset(&p->line);
            return YES;
        }
    }
    if (!p->parse_calls || (line_fenced(&p->line) && !p->options.calls_in_fences))
        return NO;
    const bool reasoning = p->state == REASONING;
    if (reasoning && (!p->options.calls_in_reasoning || p->line.last == '`'))
        return NO;

    delta_str name;
    size_t end;
    a = call_at(p, v, 0, reasoning || p->options.unknown_is_text, &name, &end);
    const bool wrapped = a == YES;
    if (a == NO && match(v, 0, call_open) == YES)
        repair(p, DELTA_REPAIR_CALL_NOT_ONE);
    else if (a == NO && !reasoning && line_at_start(&p->line)) {
        a = bare_call_at(p, v, &name, &end);
        if (a == YES)
            repair(p, DELTA_REPAIR_CALL_BARE);
    }
    if (a == YES) {
        begin_call(p, name, wrapped);
        p->at += end;
    }
    return a;
}

static bool step_text(delta_output *p)
{
    const size_t n = p->in.len - p->at;
    if (n == 0)
        return false;
    const char *s = p->in.p + p->at, *tag = memchr(s, '<', n);
    if (tag != s) {
        put_text(p, tag ? (size_t)(tag - s) : n);
        return true;
    }
    view v = look(p);
    enum answer a = text_tag(p, &v);
    if (a == MORE && v.full) {
        repair(p, DELTA_REPAIR_HOLD_FULL);
        a = NO;
    }
    if (a == NO)
        put_text(p, 1);
    return a != MORE;
}

/* ---- the end of a value
 *
 * All that decides it stands here, down to value_end(). A closing tag is taken for one by what
 * follows it, behind white space:
 *
 *   </parameter>  behind it: </function> that holds; </tool_call>; </parameter>; a call of a declared
 *                 tool; the end of the turn; <parameter=X>, X declared and not used in this call; or
 *                 another <parameter=X> whose first </parameter> holds by the same list
 *   </function>   behind it: </tool_call>; a call; the end of the turn
 *   nothing       <parameter=X> at a line's start, X declared and not used; a </function> that holds;
 *                 </tool_call> with "<tool_call> <function=X>" or the end behind it. A misspelt
 *                 </parameter1> just before these goes with them
 *
 * A tag that the end of the turn cut in two counts as whole. From "<tool_call>", newline,
 * "<function=" at a line's start to the "</tool_call>" of that, nothing ends a value (step_nest()).
 * engine/grammar/text.h is the same table as an automaton: change both. */

static bool is_used(const delta_output *p, delta_str name)
{
    for (size_t i = 0; i < p->used.len;) {
        const size_t len = strlen(p->used.p + i);
        if (de_str_eq((delta_str){ p->used.p + i, len }, name))
            return true;
        i += len + 1;
    }
    return false;
}

/* A parameter that this call may still bring. */
static bool is_due(const delta_output *p, delta_str name)
{
    return de_tool_param(p->tool, name) && !is_used(p, name);
}

/* What comes behind a "</function>" that ends at i: does it bear out that a call ended there? */
static enum answer function_end_holds(const delta_output *p, const view *v, size_t i)
{
    const view w = without_end(v);
    i = skip_space(v, i);
    if (i == v->n)
        return v->last ? YES : MORE;
    enum answer a = match(&w, i, call_close);
    if (a == NO)
        a = opener_at(p, &w, i, false);
    return a == MORE && v->last ? YES : a;
}

/* Behind the "</parameter>" at the front: was it one? An undeclared or repeated parameter that
 * follows bears it out only if its own end does, and so on. What was found out about the first links
 * of that chain is kept until more has come. */
static enum answer param_end_holds(delta_output *p, const view *v)
{
    const view w = without_end(v);
    if (p->chain.links == 0) {
        p->chain.links = 1;
        p->chain.i = param_close.len;
    }
    for (;;) {
        const size_t i = skip_space(v, p->chain.i);
        if (i == v->n)
            return v->last ? YES : MORE;
        enum answer a = match(&w, i, function_close);
        if (a == YES)
            return function_end_holds(p, v, i + function_close.len);
        if (a == NO)
            a = match(&w, i, call_close);
        if (a == NO)
            a = match(&w, i, param_close);
        if (a == NO) /* closers are missing, but a call of a tool that exists follows */
            a = opener_at(p, &w, i, true);
        if (a != NO)
            return v->last ? YES : a;

        a = match(&w, i, param_open);
        if (a == NO)
            return NO;
        delta_str name = { NULL, 0 };
        size_t from = i + param_open.len;
        if (a == YES)
            a = param_at(&w, i, &name, &from);
        if (a == MORE || (a == YES && is_due(p, name)))
            return v->last ? YES : a;
        if (p->chain.search > from)
            from = p->chain.search;
        const char *close = memmem(v->s + from, v->n - from, param_close.p, param_close.len);
        if (!close) {
            p->chain.search = v->n - from >= param_close.len ? v->n - param_close.len + 1 : from;
            return more_or_no(v);
        }
        if (p->chain.links++ == CHAIN_MAX) {
            repair(p, DELTA_REPAIR_HOLD_FULL);
            return YES;
        }
        p->chain.i = (size_t)(close - v->s) + param_close.len;
        p->chain.search = 0;
    }
}

/* Does the value end at i although nothing closed it? */
static enum answer value_ends_unclosed(const delta_output *p, const view *v, size_t i,
                                       bool line_start)
{
    enum answer a = match(v, i, function_close);
    if (a != NO)
        return a == YES ? function_end_holds(p, v, i + function_close.len) : a;
    a = match(v, i, call_close);
    if (a == YES) {
        i = skip_space(v, i + call_close.len);
        if (i == v->n)
            return v->last ? YES : MORE;
        delta_str name;
        size_t end;
        return call_at(p, v, i, false, &name, &end);
    }
    if (a == NO && line_start) {
        delta_str name;
        size_t end;
        a = param_at(v, i, &name, &end);
        if (a == YES)
            a = is_due(p, name) ? YES : NO;
    }
    return a;
}

/* "</parameter1>" and the like, with an unclosed end behind it. */
static enum answer broken_closer(const delta_output *p, const view *v, size_t *ret_end)
{
    enum answer a = match(v, 0, param_close_start);
    if (a != YES)
        return a;
    size_t i = param_close_start.len;
    while (i < v->n && v->s[i] != '>' && v->s[i] != '<' && v->s[i] != '\n' &&
           i < param_close_start.len + BROKEN_CLOSER_MAX)
        i++;
    if (i < v->n && v->s[i] == '>')
        i++;
    *ret_end = i;
    i = skip_space(v, i);
    if (i == v->n)
        return more_or_no(v);
    return value_ends_unclosed(p, v, i, v->s[i - 1] == '\n');
}

/* At a '<' in a value: does it end here? *ret_skip: bytes of the closer. */
static enum answer value_end(delta_output *p, const view *v, size_t *ret_skip)
{
    *ret_skip = 0;
    enum answer a = match(v, 0, param_close);
    if (a == YES) {
        a = param_end_holds(p, v);
        if (a == MORE && v->full) { /* a long undeclared parameter is likelier than a trap */
            repair(p, DELTA_REPAIR_HOLD_FULL);
            a = YES;
        }
        if (a == NO)
            repair(p, DELTA_REPAIR_TAG_IN_VALUE);
        *ret_skip = param_close.len;
        return a;
    }
    if (a == MORE)
        return MORE;
    a = broken_closer(p, v, ret_skip);
    if (a == YES)
        repair(p, DELTA_REPAIR_CLOSER_BROKEN);
    if (a != NO)
        return a;
    *ret_skip = 0;
    a = value_ends_unclosed(p, v, 0, p->line_start);
    if (a == YES)
        repair(p, DELTA_REPAIR_CLOSER_MISSING);
    return a;
}

/* ---- a value */

static void send_key(delta_output *p)
{
    if (p->key.failed) {
        p->failed = true;
        return;
    }
    de_text t = { 0 };
    de_text_puts(&t, p->any_param ? "," : "{");
    de_json_write_string(&t, p->key.p, p->key.len);
    de_text_puts(&t, ":");
    p->any_param = true;
    p->failed |= t.failed;
    if (!t.failed)
        emit_args(p, t.p, t.len);
    de_text_done(&t);
}

static void send_string_part(delta_output *p, const char *s, size_t n)
{
    de_text t = { 0 };
    de_json_write_string_part(&t, s, n);
    p->failed |= t.failed;
    if (t.len)
        emit_args(p, t.p, t.len);
    de_text_done(&t);
}

/* The text so far may still become the word null. */
static bool may_be_null(const de_text *t)
{
    return t->len <= 4 && (memcmp(t->p, "null", t->len) == 0 || memcmp(t->p, "None", t->len) == 0);
}

/* Bytes that are surely of the value. */
static void put_value(delta_output *p, const char *s, size_t n)
{
    if (p->drop || n == 0)
        return;
    if (!p->in_string) {
        de_text_add(&p->value, s, n);
        const bool text = (p->types & ~(unsigned)DE_TYPE_NULL) == DE_TYPE_STRING;
        if (!text || p->value.failed || (p->types & DE_TYPE_NULL && may_be_null(&p->value)))
            return;
        send_key(p);
        emit_args(p, "\"", 1);
        p->in_string = true;
        s = p->value.p;
        n = p->value.len;
    }
    send_string_part(p, s, n);
}

/* Consumes n > 0 bytes as data. The last newline waits: it may be the closer's. */
static void put_data(delta_output *p, size_t n)
{
    const char *s = p->in.p + p->at;
    p->at += n;
    p->chain.links = 0;
    p->chain.search = 0;
    if (p->newline)
        put_value(p, "\n", 1);
    p->line_start = p->newline = s[n - 1] == '\n';
    put_value(p, s, n - p->newline);
}

/* cut: the output ended inside the value. A half number is no number: it is left out. */
static void end_value(delta_output *p, bool cut)
{
    if (cut && p->newline)
        put_value(p, "\n", 1);
    if (p->in_string) {
        emit_args(p, "\"", 1);
    } else if (!p->drop && !(cut && p->types != DE_TYPE_STRING)) {
        de_text t = { 0 };
        de_text_add(&p->value, "", 0);
        if (!p->value.failed &&
            !de_value_write(&t, (delta_str){ p->value.p, p->value.len }, p->types))
            repair(p, DELTA_REPAIR_VALUE_TYPE);
        p->failed |= t.failed;
        send_key(p);
        if (t.p)
            emit_args(p, t.p, t.len);
        de_text_done(&t);
    }
    p->failed |= p->value.failed || p->key.failed || p->used.failed;
    p->state = ARGS;
}

static void begin_value(delta_output *p, delta_str name)
{
    const de_param *param = de_tool_param(p->tool, name);
    p->state = VALUE;
    p->types = param ? param->types : DE_TYPE_STRING;
    p->drop = p->n_used >= PARAMS_MAX || is_used(p, name);
    if (p->drop) {
        repair(p, DELTA_REPAIR_PARAM_REPEATED);
    } else {
        de_text_add(&p->used, name.p, name.len);
        de_text_add(&p->used, "", 1);
        p->n_used++;
    }
    p->key.len = p->value.len = 0;
    de_text_add(&p->key, name.p, name.len);
    p->begun = p->newline = p->in_string = false;
    p->line_start = true;
    p->nest = 0;
    p->chain.links = 0;
    p->chain.search = 0;
}

/* Calls quoted in a value: their tags are data. YES: consumed. */
static enum answer step_nest(delta_output *p, const view *v)
{
    enum answer a = p->line_start ? match(v, 0, nest_open) : NO;
    if (a == YES) {
        p->nest++;
        put_data(p, nest_open.len);
    } else if (a == NO && p->nest) {
        a = match(v, 0, call_close);
        if (a == YES) {
            p->nest--;
            put_data(p, call_close.len);
        }
    }
    return a;
}

static bool step_value(delta_output *p)
{
    const size_t n = p->in.len - p->at;
    if (n == 0)
        return false;
    const char *s = p->in.p + p->at;
    if (!p->begun) {
        p->begun = true;
        if (s[0] == '\n')
            p->at++;
        return true;
    }
    const char *tag = memchr(s, '<', n);
    if (tag != s) {
        put_data(p, tag ? (size_t)(tag - s) : n);
        return true;
    }
    view v = look(p);
    enum answer a = step_nest(p, &v);
    if (a == YES)
        return true;
    size_t skip = 0;
    if (a == NO && p->nest == 0)
        a = value_end(p, &v, &skip);
    if (a == MORE && v.full) {
        repair(p, DELTA_REPAIR_HOLD_FULL);
        a = NO;
    }
    if (a == YES) {
        p->at += skip;
        end_value(p, false);
    } else if (a == NO) {
        put_data(p, 1);
    }
    return a != MORE;
}

/* ---- between the parameters, and behind a call */

static void end_call(delta_output *p, bool complete)
{
    emit_args(p, p->any_param ? "}" : "{}", p->any_param ? 1 : 2);
    emit(p, DELTA_OUT_CALL_END, p->args.p, p->args.len);
    if (p->n_events)
        p->events[p->n_events - 1].e.complete = complete;
    p->n_complete += complete;
    if (!complete)
        repair(p, DELTA_REPAIR_CALL_CUT);
    p->failed |= p->args.failed;
    p->state = AFTER;
}

/* At a '<' between parameters. */
static enum answer args_tag(delta_output *p, const view *v)
{
    const view w = without_end(v);
    delta_str name = { NULL, 0 };
    size_t end = 0;
    enum answer a = param_at(v, 0, &name, &end);
    /* The turn ends in the tag of a parameter: whatever that was to be is missing. */
    p->param_cut |= v->last && v->n > 1 && param_at(&w, 0, &name, &end) == MORE;
    if (a == YES) {
        begin_value(p, name);
        p->at += end;
    }
    if (a != NO)
        return a;
    if (match(v, 0, param_open) == YES) {
        repair(p, DELTA_REPAIR_PARAM_MALFORMED);
        return NO;
    }
    a = match(v, 0, function_close);
    if (a == YES) {
        end_call(p, true);
        p->at += function_close.len;
    }
    if (a != NO)
        return a;
    a = match(v, 0, param_close);
    if (a == YES) {
        if (!p->call_text)
            repair(p, DELTA_REPAIR_CLOSER_REPEATED);
        p->at += param_close.len;
    }
    if (a != NO)
        return a;
    a = match(v, 0, call_close);
    if (a == YES) { /* AFTER takes the tag */
        repair(p, DELTA_REPAIR_CLOSER_MISSING);
        end_call(p, true);
    }
    if (a != NO)
        return a;
    bool wrapped = true;
    a = call_at(p, v, 0, p->options.unknown_is_text, &name, &end);
    if (a == NO) {
        wrapped = p->wrapped;
        a = function_at(p, v, 0, p->options.unknown_is_text, &name, &end);
    }
    if (a == YES) {
        repair(p, DELTA_REPAIR_CLOSER_MISSING);
        end_call(p, true);
        begin_call(p, name, wrapped);
        p->at += end;
    }
    return a;
}

static bool step_args(delta_output *p)
{
    const size_t n = p->in.len - p->at;
    if (n == 0)
        return false;
    const char *s = p->in.p + p->at;
    const size_t space = de_space_at_start(s, n);
    if (space) {
        p->at += space;
        return true;
    }
    enum answer a = NO;
    if (s[0] == '<') {
        view v = look(p);
        a = args_tag(p, &v);
        if (a == MORE && v.full) {
            repair(p, DELTA_REPAIR_HOLD_FULL);
            a = NO;
        }
    }
    if (a == NO) {
        if (!p->call_text)
            repair(p, DELTA_REPAIR_CALL_TEXT);
        p->at++;
    }
    if (a != MORE)
        p->call_text = a == NO;
    return a != MORE;
}

/* Closers and the next call of the same wrapper; anything else is content. */
static enum answer after_tag(delta_output *p, const view *v)
{
    const view w = without_end(v);
    size_t i = skip_space(v, 0);
    if (i == v->n)
        return more_or_no(v);
    const delta_str closers[] = { call_close, function_close, param_close };
    enum answer a;
    for (size_t k = 0; k < 3; k++) {
        a = match(&w, i, closers[k]);
        if (a == MORE && v->last) { /* half a closer is no content, where one is due */
            if (!p->wrapped)
                return NO;
            p->wrapped = false;
            p->at += v->n;
            repair(p, DELTA_REPAIR_CLOSER_MISSING);
            return YES;
        }
        if (a == YES) {
            if (k == 0 && p->wrapped)
                p->wrapped = false;
            else
                repair(p, DELTA_REPAIR_CLOSER_REPEATED);
            p->at += i + closers[k].len;
        }
        if (a != NO)
            return a;
    }
    if (!p->wrapped)
        return NO;
    delta_str name;
    size_t end;
    a = function_at(p, v, i, p->options.unknown_is_text, &name, &end);
    if (a == YES) {
        begin_call(p, name, true);
        p->at += end;
    }
    return a;
}

static bool step_after(delta_output *p)
{
    view v = look(p);
    if (v.n == 0)
        return false;
    enum answer a = after_tag(p, &v);
    if (a == MORE && v.full) {
        repair(p, DELTA_REPAIR_HOLD_FULL);
        a = NO;
    }
    if (a == NO) {
        if (p->wrapped)
            repair(p, DELTA_REPAIR_CLOSER_MISSING);
        p->state = CONTENT;
        line_reset(&p->line);
    }
    return a != MORE;
}

static void run(delta_output *p)
{
    for (bool on = true; on && !p->failed;)
        switch (p->state) {
        case REASONING:
        case CONTENT:
            on = step_text(p);
            break;
        case ARGS:
            on = step_args(p);
            break;
        case VALUE:
            on = step_value(p);
            break;
        case AFTER:
            on = step_after(p);
            break;
        case ENDED:
            on = false;
            break;
        }
}

/* ---- bytes in, events out */

static void replace_bytes(delta_output *p)
{
    repair(p, DELTA_REPAIR_BYTES);
    de_text_add(&p->in, "\xEF\xBF\xBD", 3);
    p->n_utf8 = 0;
}

static void feed(delta_output *p, const unsigned char *s, size_t n)
{
    for (size_t i = 0; i < n;) {
        if (p->n_utf8 == 0) {
            size_t from = i;
            while (i < n && s[i] < 0x80 && s[i] != 0)
                i++;
            de_text_add(&p->in, (const char *)s + from, i - from);
            if (i == n)
                break;
            if (s[i] == 0) { /* JSON readers, ours too, have no NUL */
                replace_bytes(p);
                i++;
                continue;
            }
        }
        p->utf8[p->n_utf8++] = s[i];
        const int k = de_utf8_look(p->utf8, p->n_utf8);
        if (k > 0) {
            de_text_add(&p->in, (const char *)p->utf8, (size_t)k);
            p->n_utf8 = 0;
        }
        if (k >= 0 || p->n_utf8 == 1) /* else s[i] begins something else: it is looked at again */
            i++;
        if (k < 0)
            replace_bytes(p);
    }
}

static int give(delta_output *p, const delta_out_event **ret_events, size_t *ret_n,
                delta_error *err)
{
    p->failed |= p->in.failed || p->text.failed || p->blank.failed;
    if (!p->failed && p->n_events > p->cap_out) {
        delta_out_event *more = realloc(p->out, p->cap_events * sizeof *more);
        p->failed = !more;
        if (more) {
            p->out = more;
            p->cap_out = p->cap_events;
        }
    }
    if (p->failed)
        return delta_fail(err, DELTA_ENOMEM, "output parser: %zu bytes waiting", p->in.len);
    for (size_t i = 0; i < p->n_events; i++) {
        p->out[i] = p->events[i].e;
        p->out[i].text.p = p->text.p ? p->text.p + p->events[i].begin : NULL;
    }
    *ret_events = p->out;
    *ret_n = p->n_events;
    return 0;
}

/* What was consumed goes; called before new bytes come in. */
static void begin(delta_output *p)
{
    if (p->at) {
        memmove(p->in.p, p->in.p + p->at, p->in.len - p->at);
        p->in.len -= p->at;
        p->at = 0;
    }
    p->n_events = 0;
    p->text.len = 0;
}

int delta_output_new(const delta_output_options *o, delta_output **ret_p, delta_error *err)
{
    assert(o && ret_p);
    delta_output *p = calloc(1, sizeof *p);
    if (!p)
        return delta_fail(err, DELTA_ENOMEM, "output parser: %zu bytes", sizeof *p);
    size_t bytes = 0;
    for (size_t i = 0; i < o->n_tools; i++)
        bytes +=
            o->tools_json[i].len < SIZE_MAX / 1024 / (o->n_tools + 1) ? o->tools_json[i].len : 0;
    de_arena_init(&p->arena, 64 * (bytes + 64 * o->n_tools) + 4096);
    int e = de_tools_read(&p->arena, o->tools_json, o->n_tools, &p->tools, err);
    if (e < 0) {
        delta_output_free(p);
        return e;
    }
    p->options = *o;
    p->options.tools_json = NULL;
    p->parse_calls = o->tools != DELTA_TOOLS_NONE && o->n_tools > 0;
    p->state = o->thinking ? REASONING : CONTENT;
    p->lead = p->at_start = true;
    *ret_p = p;
    return 0;
}

void delta_output_free(delta_output *p)
{
    if (!p)
        return;
    de_arena_done(&p->arena);
    de_text_done(&p->in);
    de_text_done(&p->blank);
    de_text_done(&p->args);
    de_text_done(&p->used);
    de_text_done(&p->key);
    de_text_done(&p->value);
    de_text_done(&p->text);
    free(p->events);
    free(p->out);
    free(p);
}

int delta_output_push(delta_output *p, const char *bytes, size_t len, bool added,
                      const delta_out_event **ret_events, size_t *ret_n, delta_error *err)
{
    assert(p && ret_events && ret_n);
    (void)added;
    if (p->state == ENDED)
        return delta_fail(err, DELTA_ESTATE, "output parser: the turn is over");
    begin(p);
    if (len)
        feed(p, (const unsigned char *)bytes, len);
    p->failed |= p->in.failed;
    run(p);
    return give(p, ret_events, ret_n, err);
}

int delta_output_finish(delta_output *p, enum delta_out_end end, const delta_out_event **ret_events,
                        size_t *ret_n, enum delta_out_finish *ret_finish, delta_error *err)
{
    assert(p && ret_events && ret_n && ret_finish);
    if (p->state == ENDED)
        return delta_fail(err, DELTA_ESTATE, "output parser: the turn is over");
    begin(p);
    if (p->n_utf8)
        replace_bytes(p);
    p->last = true;
    p->failed |= p->in.failed;
    run(p);
    if (!p->failed && p->state == VALUE) {
        end_value(p, true);
        end_call(p, false);
    } else if (!p->failed && p->state == ARGS) {
        const bool complete = end == DELTA_OUT_END_STOP && !p->param_cut;
        if (complete)
            repair(p, DELTA_REPAIR_CLOSER_MISSING);
        end_call(p, complete);
    }
    p->state = ENDED;
    int e = give(p, ret_events, ret_n, err);
    if (e >= 0)
        *ret_finish = end == DELTA_OUT_END_LENGTH ? DELTA_OUT_LENGTH
                      : p->n_complete             ? DELTA_OUT_TOOL_CALLS
                                                  : DELTA_OUT_STOP;
    return e;
}

/* ---- what was mended */

uint32_t delta_output_repairs(const delta_output *p, enum delta_repair which)
{
    return (unsigned)which < DELTA_REPAIR_N ? p->repairs[which] : 0;
}

const char *delta_repair_name(enum delta_repair which)
{
    static const char *const names[] = {
#define X(name, text) text,
        DELTA_REPAIR_MAP(X)
#undef X
    };
    return (unsigned)which < DELTA_REPAIR_N ? names[which] : "unknown";
}
