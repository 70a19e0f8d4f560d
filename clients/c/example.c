/* example.c -- one question to deltad, its answer streamed to standard output.
 *
 *   cc example.c $(pkg-config --cflags --libs deltac) -o example
 *   ./example "What color is the sky?" [SOCKET] */
#include <deltac.h>
#include <deltad/v1/inference.pb-c.h>
#include <stdio.h>

int main(int argc, char **argv)
{
    if (argc < 2 || argc > 3) {
        (void)fprintf(stderr, "usage: example QUESTION [SOCKET]\n");
        return 64;
    }
    Deltad__V1__Part text = DELTAD__V1__PART__INIT, *parts[] = { &text };
    text.part_case = DELTAD__V1__PART__PART_TEXT;
    text.text = argv[1];
    Deltad__V1__Message message = DELTAD__V1__MESSAGE__INIT, *messages[] = { &message };
    message.role = DELTAD__V1__ROLE__ROLE_USER;
    message.parts = parts;
    message.n_parts = 1;
    Deltad__V1__ChatRequest request = DELTAD__V1__CHAT_REQUEST__INIT;
    request.messages = messages;
    request.n_messages = 1;

    dc_client *client = NULL;
    dc_call *call;
    dc_status status;
    ProtobufCMessage *m;
    int r = dc_open(argc > 2 ? argv[2] : NULL, &client, &status);
    if (r == 0)
        r = dc_start(client, DC_CHAT, &request.base, 0, &call, &status);
    while (r >= 0 && (r = dc_next(call, &deltad__v1__chat_event__descriptor, &m, &status)) > 0) {
        const Deltad__V1__ChatEvent *event = (const Deltad__V1__ChatEvent *)m;
        if (event->event_case == DELTAD__V1__CHAT_EVENT__EVENT_TEXT)
            (void)fputs(event->text->text, stdout);
        (void)fflush(stdout);
        protobuf_c_message_free_unpacked(m, NULL);
    }
    if (r == 0)
        (void)putchar('\n');
    else
        (void)fprintf(stderr, "example: %s: %s\n", dc_code_name(status.code), status.message);
    dc_free(client); /* and with it the call */
    return r == 0 ? 0 : 1;
}
