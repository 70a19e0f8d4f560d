/* limits.h -- every fixed limit of the daemon's core in one place; the settable ones are in
 * config.h. Nothing a peer sends makes anything here grow past these. */
#ifndef DD_LIMITS_H
#define DD_LIMITS_H

enum {
    DD_WIRE_DEPTH = 16,              /* messages inside messages */
    DD_WIRE_ARENA_FACTOR = 8,        /* a decoded request: so many bytes for each of the wire */
    DD_WIRE_ARENA_BASE = 4 << 20,    /* and so many besides */
    DD_ID_BYTES = 64,                /* request and session ids, with the NUL */
    DD_EVENTS_HELD = 256,            /* events that wait for one reader before it is paused */
    DD_EVENT_BYTES_HELD = 256 << 10, /* and their bytes */
    DD_BATCHES_HELD = 64,            /* steps whose events the loop has not taken yet */
    DD_INLINE_BYTES = 32 << 10, /* a text this long is rendered and tokenised on a worker thread */
    DD_JOBS_HELD = 64,          /* calls from long texts alone that workers have or wait for */
    DD_RECALL_TURNS = 4096,     /* answers with calls kept as they were sampled */
    DD_RECALL_BYTES = 64 << 20, /* and their bytes */
    DD_RECALL_TURN_BYTES = 1 << 20, /* of one of them */
    DD_RECALL_CALLS = 128,          /* calls of one of them */
    DD_RETRY_MS = 1000,             /* what RetryInfo advises */
    DD_WATCHERS = 1024,             /* Health.Watch calls */
    DD_EXPORT_PIECE = 1 << 20,      /* bytes of one message of ExportSession */
    DD_EXPORTS = 16,                /* exports that are being read */
    DD_SAVE_NAME = 64,              /* letters of a save's name */
    DD_SAVES = 256,                 /* files of one user */
    DD_SAVES_HELD = 16,             /* calls that write or read one */
    DD_FORKS = 64,                  /* sessions of one ForkSession */
    DD_SESSION_MESSAGES = 1 << 16,  /* of one named session */
    DD_SESSION_BYTES = 64 << 20,    /* its transcript and tools */
    DD_RESUME_BYTES = 4 << 20,      /* events kept of one request */
    DD_RESUME_RESTING = 64,         /* requests whose events are kept after their end */
    DD_AHEAD = 8,                   /* prompts that are computed before they are asked */
    DD_MARKS = 16,                  /* places in a prompt where states are asked for */
    DD_CHECKPOINT_MESSAGES = 8,     /* of them, of the client's own choice */
    DD_SALT_BYTES = 128,            /* CacheControl.salt, with the NUL */
    DD_GRAMMARS = 64,               /* compiled grammars kept for the next request */
    DD_GRAMMAR_BYTES = 256 << 20,   /* and their bytes, masks included */
};

#endif
