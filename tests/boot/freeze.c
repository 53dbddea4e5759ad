/* Holds one thread of another program still, as a fault in it would: freeze TID */
#include <stdio.h>
#include <stdlib.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/wait.h>

int main(int argc, char **argv) {
    pid_t tid = argc == 2 ? atoi(argv[1]) : 0;
    int status;
    if (tid <= 0 || ptrace(PTRACE_ATTACH, tid, NULL, NULL) != 0) {
        perror("freeze");
        return 1;
    }
    /* Stays until the thread is gone, which only a kill of the whole program brings about. */
    while (waitpid(tid, &status, __WALL) == tid && !WIFEXITED(status) && !WIFSIGNALED(status)) {
    }
    return 0;
}
